"""Models of vision and language: two ranks of which one has no image train as one process does, for
every ZeRO stage; and the whole recipe, with the export."""

import json
from pathlib import Path

import pytest
import yaml
from pairs import results_of_each
from processes import sftmix, sftmix_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from vision_models import FAMILIES, picture, save_model

from sftmix.batches.images import ImageProcessor
from sftmix.config.schema import Config
from sftmix.data.prepare import prepare
from sftmix.data.tokenizer import tokenizer_from

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "vision_worker.py"
ROWS = [
    {"prompt": "<image>Which?", "completion": "red", "images": ["0.png"]},
    {"prompt": "<image>or<image>?", "completion": "blue", "images": ["1.png", "2.png"]},
    {"prompt": "Why?", "completion": "no"},
    {"prompt": "How many?", "completion": "seven"},
]


def write_rows(folder, rows):
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(sharded))
    rows = write_rows(folder, ROWS)
    for family in FAMILIES:
        save_model(folder / family, family)
        (folder / f"{family}-data").mkdir()
        config = Config.model_validate(
            {
                "run": {"dir": folder / "run"},
                "model": {"path": str(folder / family)},
                "data": {"path": str(rows), "held_out_share": 0.0},
            }
        )
        prepare(config, folder / f"{family}-data")
    return results_of_each(WORKER, folder)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rank_without_images_trains_with_one_that_has_some(results, family, stage):
    expected = results[1][f"{family} 0"]["steps"]
    assert expected[0][0] > expected[1][0]
    for num_ranks in (1, 2):
        found = results[num_ranks][f"{family} {stage}"]
        assert found["steps"] == [pytest.approx(step, rel=1e-4) for step in expected], num_ranks
        assert not found["packs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_is_frozen(results, family):
    for num_ranks in (1, 2):
        for stage in (0, 2, 3):
            changed = results[num_ranks][f"{family} {stage}"]["changed"]
            language = [n for n in changed if "text_model" in n or "language_model" in n]
            assert language and set(changed) - set(language) <= {"lm_head.weight"}


def test_the_whole_recipe_and_its_export(tmp_path):
    """Trained by two ranks; scores, split, both trainings and figures of the held-out part."""
    source = save_model(tmp_path / "source", "qwen2_5_vl")
    rows = [
        {
            "prompt": "<image>Which?" if n % 3 else "Why?",
            "completion": f"{n} is red",
            **({"images": [f"{n % 3}.png"]} if n % 3 else {}),
        }
        for n in range(24)
    ]
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(source)},
        "data": {"path": str(write_rows(tmp_path, rows)), "held_out_share": 0.2, "max_length": 256},
        "engine": {"precision": "fp32"},
        "train": {"epochs": 1, "batch_size": 8, "micro_batch_tokens": 200},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = sftmix_on_ranks(2, "report", str(tmp_path / "run.yaml"))
    assert "is padded, not packed: it reads images" in done.stdout
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics
    assert "[image] Which?" in (tmp_path / "run/report/index.html").read_text()
    exported = tmp_path / "run/sftmix/model"
    _, report = AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before, after = (load_file(f / "model.safetensors") for f in (source, exported))
    assert before.keys() == after.keys()  # named as in the source
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("visual" in name for name in changed)
    # The export reads images by itself, and stands for its source in a further run.
    processor = ImageProcessor(exported, tokenizer_from(exported))
    assert len(processor.tokens(picture(0))) == 2
    assert "image-text-to-text" in (exported / "README.md").read_text()
    sftmix(
        "data", str(tmp_path / "run.yaml"), f"model.path={exported}", f"run.dir={tmp_path / '2'}"
    )
