"""Rows with images become token ids with a placeholder for every feature of the vision tower, and
their loss is the one that transformers computes."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from vision_models import FAMILIES, expected_text, image_processor, picture, save_model

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.batches.examples import TokenisedExamples
from sftmix.batches.images import open_image
from sftmix.config.schema import Config
from sftmix.data.prepare import prepare
from sftmix.errors import ConfigError, DataError
from sftmix.loss.head import CausalLMWithLoss
from sftmix.loss.objective import Objective, loss_request

PLAIN = {"prompt": "Why?", "completion": "no"}
TURNS = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "no"}]}
ANSWER = {"role": "assistant", "content": "red"}
TEXT_PART = {"type": "text", "text": "Which?"}
WRITTEN = {  # of a question that begins with an image, and its answer
    "qwen2_5_vl": (
        "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>Which?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "red<|im_end|>",
        "\n",
    ),
    "smolvlm": (
        "<|im_start|>User:{image} Which?<end_of_utterance>\nAssistant:",
        " red<end_of_utterance>",
        "\n",
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return {family: save_model(folder / family, family) for family in FAMILIES}


@pytest.fixture
def prepared(models, tmp_path):
    """Prepares rows for a model, with the pictures 0.png to 3.png beside their file."""

    def run(rows, family="qwen2_5_vl", *, file=None, **data):
        for number in range(4):
            (tmp_path / f"{number}.png").write_bytes(picture(number))
        if file is None:
            file = tmp_path / "rows.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = Config.model_validate(
            {
                "run": {"dir": tmp_path / "run"},
                "model": {"path": str(models.get(family, family))},
                "data": {"path": str(file), "held_out_share": 0.0, **data},
            }
        )
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        summary, *_ = prepare(config, folder)
        return TokenisedExamples(folder / "train.arrow"), summary

    return run


def plain_like(row):
    """Returns a row without images in the format of another."""
    if "conversations" in row:
        turns = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "no"}]
        return {"conversations": turns}
    return TURNS if "messages" in row else PLAIN


def question(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **more}


def data_url(*size):
    return "data:image/png;base64," + base64.b64encode(picture(0, *size)).decode()


FORMS = {
    "parts and a column (TRL)": question({"type": "image"}, TEXT_PART, images=["0.png"]),
    "places in a text (LLaVA, LLaMA-Factory)": {
        "conversations": [
            {"from": "human", "value": "<image>Which?"},
            {"from": "gpt", "value": "red"},
        ],
        "image": "0.png",
    },
    "a column alone": {
        "messages": [{"role": "user", "content": "Which?"}, ANSWER],
        "images": [{"path": "0.png", "bytes": None}],
    },
    "parts with a file (transformers)": question({"type": "image", "path": "0.png"}, TEXT_PART),
    "a data URL (OpenAI)": question(
        {"type": "image_url", "image_url": {"url": data_url()}}, TEXT_PART
    ),
    "base64": question(
        {"type": "image", "base64": base64.b64encode(picture(0)).decode()}, TEXT_PART
    ),
    "prompt and completion": {
        "prompt": [{"role": "user", "content": "<image>Which?"}],
        "completion": [ANSWER],
        "images": ["0.png"],
    },
    "two texts": {"prompt": "<image>Which?", "completion": "red", "images": "0.png"},
}


def check_written(examples, family, model):
    """Asserts that the first example is the text of WRITTEN, with loss on the answer alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    before, answer, after = WRITTEN[family]
    parts = [
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (before.format(image=expected_text(family)), answer, after)
    ]
    ids, mask = examples.tokens(0)
    assert ids.tolist() == [*parts[0], *parts[1], *parts[2]]
    start = len(parts[0])
    assert np.flatnonzero(mask).tolist() == list(range(start, start + len(parts[1])))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_the_same_tokens(prepared, models, form):
    examples, summary = prepared([FORMS[form], plain_like(FORMS[form])])
    check_written(examples, "qwen2_5_vl", models["qwen2_5_vl"])
    assert examples.column("images").tolist()[0].tolist() == [0]
    assert not summary.notes and summary.num_train == 2


def test_another_family_with_tiles_and_a_template_of_parts_alone(prepared, models):
    examples, _ = prepared([FORMS["two texts"], PLAIN], "smolvlm")
    check_written(examples, "smolvlm", models["smolvlm"])


def test_parquet_holds_the_bytes(prepared, models, tmp_path):
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "index": 0},
                        {"type": "text", "text": "Which?", "index": None},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "red", "index": None}]},
            ],
            "images": [{"bytes": picture(0), "path": "elsewhere.png"}],
        }
    ] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    examples, _ = prepared(None, file=tmp_path / "rows.parquet")
    check_written(examples, "qwen2_5_vl", models["qwen2_5_vl"])
    # Both rows have the same picture, which is kept once.
    assert [numbers.tolist() for numbers in examples.column("images")] == [[0], [0]]


def test_other_pixels_are_another_example(prepared):
    rows = [question({"type": "image", "path": f"{n}.png"}, TEXT_PART) for n in (0, 1, 0)]
    examples, summary = prepared(rows)
    first, second, third = examples.example_ids.to_pylist()
    assert third == f"{first}-2" and second != first and summary.num_duplicates == 1


def test_scores_of_other_sizes_of_images_are_not_reused(models, tmp_path):
    """A fingerprint of the processor travels with them; text alone has none."""
    found = []
    for longest in (1024, 512):
        folder = save_model(tmp_path / f"model{longest}", "qwen2_5_vl")
        file = folder / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        settings["size"]["longest_edge"] = longest
        file.write_text(json.dumps(settings))
        found.append(fingerprints_of(tmp_path / f"{longest}", folder, [FORMS["two texts"], PLAIN]))
    assert found[0]["images"] != found[1]["images"]
    again = fingerprints_of(tmp_path / "again", models["qwen2_5_vl"], [FORMS["two texts"], PLAIN])
    assert again["images"] == found[0]["images"]
    assert "images" not in fingerprints_of(
        tmp_path / "text", folder, [PLAIN, PLAIN | {"prompt": "?"}]
    )


def fingerprints_of(folder, model, rows):
    folder.mkdir()
    (folder / "0.png").write_bytes(picture(0))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model)},
        "data": {"path": str(folder / "rows.jsonl"), "held_out_share": 0.0},
    }
    return prepare(Config.model_validate(config), folder)[2]


def test_text_that_quotes_a_placeholder_is_text(prepared, models):
    examples, summary = prepared(
        [
            question({"type": "image", "path": "0.png"}, {"type": "text", "text": "<|image_pad|>"}),
            TURNS,
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(models["qwen2_5_vl"])
    ids = examples.tokens(0)[0].tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 2
    assert summary.notes == ["texts that quote a control token, which is tokenised as text: 1"]


BAD = {
    "1 place for images .* and 2 images": question(
        {"type": "image"}, TEXT_PART, images=["0.png"] * 2
    ),
    "2 places for images": {"prompt": "<image> <image>", "completion": "a", "images": ["0.png"]},
    "the image .*9.png cannot be read: No such file": question({"type": "image", "path": "9.png"}),
    "an address on the network": question({"type": "image", "url": "https://example.com/a.png"}),
    "an image cannot be read: .*identify": question({"type": "image", "path": "rows.jsonl"}),
    "none of the keys": question({"type": "image", "colour": "red"}),
    "not base64": question({"type": "image", "url": "data:image/png;base64,###"}),
    "an image is int": question({"type": "image", "image": 3}),
    "an answer has an image": {
        "messages": [
            {"role": "user", "content": "Draw."},
            {"role": "assistant", "content": [{"type": "image", "path": "0.png"}, TEXT_PART]},
        ]
    },
    "a text holds the character U.FFFC": question(
        {"type": "image", "path": "0.png"}, {"type": "text", "text": "\ufffc"}
    ),
    "a part of the kind 'video'": question({"type": "video", "path": "0.png"}, TEXT_PART),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_with_a_row_is_named(prepared, message):
    with pytest.raises(DataError, match=rf"rows.jsonl:1: .*{message}"):
        prepared([BAD[message], plain_like(BAD[message])])


def test_models_of_text_refuse_images(prepared, models, tmp_path):
    """Their tokenizer has no processor."""
    folder = tmp_path / "text"
    AutoTokenizer.from_pretrained(models["qwen2_5_vl"]).save_pretrained(folder)
    with pytest.raises(DataError, match=r"rows.jsonl:1: has an image, .* read text only"):
        prepared([FORMS["parts with a file (transformers)"]], folder)
    # A column beside a plain text may be anything: it is named.
    _, summary = prepared([PLAIN | {"image": "0.png"}, PLAIN], folder)
    assert any("not used" in note and "image (1)" in note for note in summary.notes)


def test_a_processor_that_cannot_be_loaded_is_named(prepared, models, tmp_path):
    folder = save_model(tmp_path / "broken", "qwen2_5_vl")
    (folder / "preprocessor_config.json").write_text('{"processor_class": "Qwen9Processor"}')
    with pytest.raises(ConfigError, match=r"names no processor .* found \['Qwen9Processor'\]"):
        prepared([PLAIN, PLAIN], folder)


def test_an_image_is_never_cut(prepared):
    """Truncated behind the image: kept; in the image, of 16 tokens behind 13: dropped."""
    large = question(TEXT_PART, {"type": "image", "url": data_url(32, 32)})
    rows = [large] * 2 + [TURNS] * 2
    length = len(prepared(rows)[0].tokens(0)[0])
    examples, summary = prepared(rows, max_length=length - 1, overlong="truncate")
    assert len(examples) == 4 and summary.num_truncated == 2
    _, summary = prepared(rows, max_length=28, overlong="truncate")
    assert summary.dropped == {"an image ends after 28 tokens": 2} and summary.num_train == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_transformers(prepared, models, family):
    """Of a batch of an example with two images, one without and one with one, against the model's
    own loss of each example by itself."""
    two = {"prompt": "<image>or<image>?", "completion": "blue", "images": ["1.png", "2.png"]}
    rows = [two, PLAIN, FORMS["two texts"]]
    examples, _ = prepared(rows, family)
    model = AutoModelForImageTextToText.from_pretrained(models[family])
    numbers = [[1, 2], [], [0]]
    indices = range(len(rows))
    expected, count = 0.0, 0
    for index in indices:
        ids, mask = (torch.from_numpy(part)[None] for part in examples.tokens(index))
        inputs = {"input_ids": ids.long(), "labels": ids.long().where(mask, -100)}
        if numbers[index]:
            images = [[open_image(picture(n))] for n in numbers[index]]
            inputs |= image_processor(family)(images, return_tensors="pt")
            inputs = {name: inputs[name] for name in inputs if name not in ("rows", "cols")}
        if family == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        size = int(mask.sum())
        expected += float(model(**inputs).loss) * size
        count += size
    batch = build_micro_batch(
        [examples.tokens(i) for i in indices],
        [],
        indices=tuple(indices),
        pad_id=0,
        images=examples.images(indices),
    )
    request = loss_request(Objective(), batch, StepCounts(count, 0))
    ours = CausalLMWithLoss(model)
    found = ours(batch.input_ids, batch.attention_mask, request, None, batch.images)
    assert float(found.ntp) == pytest.approx(expected / count, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_without_images_runs_the_tower_and_changes_nothing(prepared, models, family):
    examples, _ = prepared([FORMS["two texts"], PLAIN, PLAIN | {"prompt": "How?"}], family)
    model = AutoModelForImageTextToText.from_pretrained(models[family])
    plain = [examples.tokens(i) for i in (1, 2)]
    batch = build_micro_batch(plain, [], indices=(1, 2), pad_id=0, images=examples.images([1, 2]))
    assert len(batch.input_ids) == 3 and batch.owner.max() == 1 and "pixel_values" in batch.images
    assert batch.num_real_tokens == sum(len(ids) for ids, _ in plain)
    without = build_micro_batch(plain, [], indices=(1, 2), pad_id=0)
    counts = StepCounts(len(batch.rows), 0)
    ours = CausalLMWithLoss(model)
    losses = [
        float(
            ours(
                each.input_ids,
                each.attention_mask,
                loss_request(Objective(), each, counts),
                None,
                each.images,
            ).loss
        )
        for each in (batch, without)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # What a rank runs only to stay in step with the others.
    nothing = build_micro_batch([], [], indices=(), pad_id=0, images=examples.images([]))
    assert "pixel_values" in nothing.images and nothing.num_real_tokens == 0
    assert not len(nothing.rows)


def test_bad_rows_are_written_to_the_file_of_skipped_ones(prepared, tmp_path):
    rows = [BAD["an image is int"], TURNS, TURNS]
    _, summary = prepared(rows, on_error="skip")
    assert summary.num_skipped == 1
    [line] = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert "an image is int" in json.loads(line)["problem"]
