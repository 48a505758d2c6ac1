"""The data stage end to end on small files: every example that was read is accounted for, one way
or another."""

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from processes import ROOT
from tokenizers_for_tests import character_tokenizer

from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import Config, GeneratorConfig
from sftmix.data.conversations import Example, content_hash
from sftmix.data.encoding import ChatEncoder
from sftmix.data.generator import generate
from sftmix.data.prepare import Summary, data_settings, prepare
from sftmix.data.tokenizer import tokenizer_from
from sftmix.errors import DataError
from sftmix.storage.provenance import fingerprint

ALPACA_DATA = ROOT.parent / "shared" / "data" / "alpaca_data.json"
# Characters of the alpaca template, which are tokens here, and two special tokens:
BEFORE_PROMPT = 1 + len("### Instruction:\n")  # bos
BEFORE_RESPONSE = len("\n\n### Response:\n")
AFTER_RESPONSE = 1 + len("\n\n")  # eos


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A folder with the character tokenizer, which knows the end of a turn of ChatML too."""
    folder = tmp_path_factory.mktemp("characters")
    character_tokenizer(("<|im_start|>", "<|im_end|>")).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path, characters):
    """Makes a config of rows for one file (or of other data), with the character tokenizer."""

    def make(
        rows=None, *, name="rows.jsonl", seed=0, tokenizer=None, chat_template="alpaca", **data
    ):
        if rows is not None:
            data["path"] = str(write(tmp_path / name, rows))
        return Config.model_validate(
            {
                "run": {"dir": tmp_path / "run", "seed": seed},
                "model": {"architecture": {"model_type": "llama"}},
                "tokenizer": {
                    **(tokenizer or {"path": characters}),
                    "chat_template": chat_template,
                },
                "data": data,
            }
        )

    return make


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt, completion="yes", **more):
    return {"prompt": prompt, "completion": completion, **more}


def id_of(row):
    return content_hash(
        (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
    )


ROWS = [row(f"Is {n} even?", ("yes", "no")[n % 2]) for n in range(40)]


@dataclass
class Prepared:
    """What the stage gave back and wrote. train, held_out: rows of the Arrow files, by id."""

    summary: Summary
    identity: str
    train: dict[str, dict[str, Any]]
    held_out: dict[str, dict[str, Any]]
    dropped: dict[str, dict[str, Any]]
    truncated: dict[str, dict[str, Any]]

    @property
    def kept(self):
        return {**self.train, **self.held_out}


@pytest.fixture
def run(tmp_path):
    """Runs the stage into a new folder, checks the accounting identity, and reads back what was
    written."""

    def make(config):
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        summary, identity, _ = prepare(config, folder)
        arrow = {
            name: TokenisedExamples(folder / f"{name}.arrow").table.to_list()
            for name in ("train", "held_out")
        }
        listed = {
            name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
            for name in ("dropped", "truncated")
        }
        by_id = {
            name: {row["example_id"]: row for row in rows}
            for name, rows in {**arrow, **listed}.items()
        }
        assert all(len(by_id[name]) == len(rows) for name, rows in {**arrow, **listed}.items()), (
            "an id is there twice"
        )

        prepared = Prepared(summary, identity, **by_id)
        assert (
            summary.num_read
            == summary.num_train
            + summary.num_held_out
            + summary.dropped.total()
            + summary.num_skipped
            + summary.num_left_out
        )
        assert (summary.num_train, summary.num_held_out) == (
            len(prepared.train),
            len(prepared.held_out),
        )
        assert summary.dropped == Counter(row["reason"] for row in prepared.dropped.values())
        assert summary.num_truncated == len(prepared.truncated)
        assert summary.num_tokens == sum(row["num_tokens"] for row in prepared.train.values())
        assert summary.num_response_tokens == sum(
            row["num_response_tokens"] for row in prepared.train.values()
        )
        assert not prepared.dropped.keys() & prepared.kept.keys()
        assert json.loads((folder / "summary.json").read_text()) == {
            **vars(summary),
            "dropped": dict(summary.dropped),
        }
        return prepared

    return make


@pytest.mark.parametrize("share", [0, 0.02, 0.25, 0.5])
@pytest.mark.parametrize("limit", [None, 10, 1000])
def test_every_example_is_accounted_for(config, run, share, limit):
    empty = [row(f"Empty {n}?", (" \n", "")[n % 2]) for n in range(4)]
    prepared = run(config(ROWS + empty, held_out_share=share, limit=limit))
    num_kept = min(limit or 1000, len(ROWS))  # the limit counts examples that can be used
    assert prepared.summary.num_read == len(ROWS) + len(empty)
    assert prepared.dropped.keys() == {id_of(e) for e in empty} and prepared.summary.dropped == {
        "empty response": 4
    }
    assert prepared.summary.num_left_out == len(ROWS) - num_kept and len(prepared.kept) == num_kept
    assert (prepared.summary.num_held_out > 0) == (share > 0)


def test_a_limit_keeps_the_ratio_of_train_to_held_out(config, run):
    rows = [row(f"{n}?") for n in range(100)]
    prepared, everything = (
        run(config(rows, limit=20, held_out_share=0.25)),
        run(config(rows, held_out_share=0.25)),
    )
    assert (prepared.summary.num_train, prepared.summary.num_held_out) == (15, 5)
    assert (
        prepared.held_out.keys() < everything.held_out.keys()
        and prepared.train.keys() < everything.train.keys()
    )


def test_a_limit_draws_with_the_seed_and_keeps_the_order_of_the_file(config, run):
    rows = [row(f"{n}?") for n in range(100)]
    first, again, other = (
        list(run(config(rows, limit=20, held_out_share=0, seed=seed)).train) for seed in (0, 0, 1)
    )
    assert first == again and set(first) != set(other)
    assert first == [id_of(r) for r in rows if id_of(r) in first]


MAX_LENGTH = 60
# characters of prompt and response, with what stands behind it
FREE = MAX_LENGTH - BEFORE_PROMPT - BEFORE_RESPONSE
OVERLONG = {
    "fits": row("p" * 5, "r" * (FREE - AFTER_RESPONSE - 5)),
    "one over": row("p" * 6, "r" * (FREE - AFTER_RESPONSE - 5)),
    "long response": row("why", "r" * 500),
    "one response token left": row("p" * (FREE - 1), "yes"),
    "no response token left": row("p" * FREE, "yes"),
    "long prompt": row("p" * 500, "yes"),
}
OVERLONG_ROWS = [row("a"), row("b"), *OVERLONG.values()]


def ids_of(*names):
    return {id_of(OVERLONG[name]) for name in names}


def test_truncation_lists_what_is_cut_and_drops_what_has_no_response_left(config, run):
    prepared = run(config(OVERLONG_ROWS, max_length=MAX_LENGTH, held_out_share=0))
    assert prepared.truncated.keys() == ids_of(
        "one over", "long response", "one response token left"
    )
    assert prepared.dropped.keys() == ids_of("no response token left", "long prompt")
    assert prepared.summary.dropped == {f"no response token within {MAX_LENGTH} tokens": 2}
    for example_id, example in prepared.train.items():
        is_truncated = example_id in prepared.truncated
        assert example["is_truncated"] == is_truncated
        assert example["num_tokens"] == MAX_LENGTH or not is_truncated
    whole = OVERLONG["long response"]
    listed = prepared.truncated[id_of(whole)]
    num_tokens = (
        BEFORE_PROMPT
        + len(whole["prompt"])
        + BEFORE_RESPONSE
        + len(whole["completion"])
        + AFTER_RESPONSE
    )
    assert (listed["num_tokens"], listed["kept"]) == (num_tokens, MAX_LENGTH)
    assert listed["place"].endswith(f"rows.jsonl:{OVERLONG_ROWS.index(whole) + 1}")
    assert prepared.train[id_of(OVERLONG["one response token left"])]["num_response_tokens"] == 1


def test_dropping_drops_exactly_what_is_too_long(config, run):
    prepared = run(config(OVERLONG_ROWS, max_length=MAX_LENGTH, overlong="drop", held_out_share=0))
    assert prepared.dropped.keys() == ids_of(*OVERLONG) - ids_of("fits") and not prepared.truncated
    assert prepared.summary.dropped == {f"longer than {MAX_LENGTH} tokens": 5}
    assert not any(example["is_truncated"] for example in prepared.train.values())


def test_a_long_example_is_an_error_where_that_is_asked_for(config, run):
    longest = OVERLONG["one over"]
    with pytest.raises(
        DataError, match=f"rows.jsonl:3: {MAX_LENGTH + 1} tokens, data.max_length is {MAX_LENGTH}"
    ):
        run(
            config(
                [row("a"), row("b"), longest],
                max_length=MAX_LENGTH,
                overlong="error",
                held_out_share=0,
            )
        )
    assert (
        run(
            config(
                [row("a"), row("b"), longest],
                max_length=MAX_LENGTH + 1,
                overlong="error",
                held_out_share=0,
            )
        ).summary.num_train
        == 3
    )


WEIGHTS = {"half": 0.5, "once": 1, "twice": 2, "more": 2.5}


@pytest.fixture
def weighted(tmp_path):
    """A source of ten rows for each weight."""
    return [
        {
            "path": str(
                write(tmp_path / f"{name}.jsonl", [row(f"{name} {n}?") for n in range(10)])
            ),
            "weight": weight,
        }
        for name, weight in WEIGHTS.items()
    ]


def test_weights_use_a_share_of_a_source_or_copies_of_it(config, run, weighted):
    prepared = run(config(sources=weighted, held_out_share=0.1))
    times = defaultdict(Counter)
    for example in prepared.kept.values():
        name, number = json.loads(example["messages"])[0]["content"].split()
        times[name][number] += 1
    assert sorted(times["half"].values()) == [1] * 5
    assert sorted(times["once"].values()) == [1] * 10
    assert sorted(times["twice"].values()) == [2] * 10
    assert sorted(times["more"].values()) == [2] * 5 + [3] * 5
    assert prepared.summary.num_left_out == 5 and prepared.summary.num_duplicates == 10 + 15


def test_a_limit_counts_copies_and_a_fraction_is_drawn_with_the_seed(config, run, weighted):
    prepared = run(config(sources=weighted, limit=12))
    assert len(prepared.kept) == 12 and prepared.summary.num_left_out == 5 + (5 + 10 + 20 + 25 - 12)
    halves = [run(config(sources=weighted[:1], seed=seed)).kept.keys() for seed in (0, 0, 1)]
    assert halves[0] == halves[1] != halves[2]


def test_a_fraction_is_the_same_wherever_its_file_lies(config, run, tmp_path):
    places = [tmp_path / name / "rows.jsonl" for name in ("here", "moved")]
    for place in places:
        place.parent.mkdir()
        write(place, [row(f"{n}?") for n in range(40)])
    halves = [
        run(config(sources=[{"path": str(place), "weight": 0.5}])).kept.keys() for place in places
    ]
    assert halves[0] == halves[1]
    # Two sources are drawn apart, even of the same rows.
    twice = run(config(sources=[{"path": str(place), "weight": 0.5} for place in places])).kept
    assert len({parts_of(example_id)[0] for example_id in twice}) > 20


def parts_of(example_id):
    content, _, number = example_id.partition("-")
    return content, int(number or 1)


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_numbered_and_never_on_both_sides(config, run, seed):
    rows = [r for n, r in enumerate(ROWS[:20]) for _ in range(1 + n % 4)]  # 1 to 4 times each
    random.Random(seed).shuffle(rows)
    prepared = run(config(rows, held_out_share=0.5, seed=seed))
    numbers = defaultdict(list)
    for content, number in map(parts_of, prepared.kept):
        numbers[content].append(number)
    assert {content: sorted(n) for content, n in numbers.items()} == {
        id_of(r): list(range(1, 2 + n % 4)) for n, r in enumerate(ROWS[:20])
    }
    assert prepared.summary.num_duplicates == len(rows) - 20
    sides = [
        {parts_of(example_id)[0] for example_id in part}
        for part in (prepared.train, prepared.held_out)
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_what_is_held_out_does_not_depend_on_the_order_of_the_file_but_on_the_seed(config, run):
    rows = [*ROWS, *ROWS[:5]]
    first, backwards, other = (
        run(config(r, held_out_share=0.25, seed=seed))
        for r, seed in ((rows, 0), (rows[::-1], 0), (rows, 1))
    )
    assert first.held_out.keys() == backwards.held_out.keys() != other.held_out.keys()
    assert (
        len(first.held_out) >= round(0.25 * len(rows))
        and first.train.keys() == backwards.train.keys()
    )
    assert list(first.train) != list(backwards.train)  # the order of the file is kept


LONG_ROWS = [*ROWS, row("why", "r" * 100)]
SAME = {"max_length": 120, "held_out_share": 0.25}


def test_the_same_input_gives_the_same_identity(config, run):
    assert (
        run(config(LONG_ROWS, **SAME)).identity
        == run(config(LONG_ROWS, name="moved.jsonl", **SAME)).identity
    )


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 119},
        {"max_length": 1000},
        {"overlong": "drop"},
        {"held_out_share": 0.5},
        {"limit": 30},
        {"seed": 1},
        {"chat_template": "chatml"},
        {"rows": [*LONG_ROWS[:-1], row("why", "r" * 99 + "s")]},  # a letter behind the cut
        {"rows": LONG_ROWS[::-1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_setting_or_content_gives_another_identity(config, run, change):
    same = {"rows": LONG_ROWS, **SAME}
    assert run(config(**{**same, **change})).identity != run(config(**same)).identity


def test_other_token_ids_of_the_same_number_give_another_identity(tmp_path, config, run):
    shifted = tmp_path / "shifted"
    # every character's id is one less: one special token, not two
    character_tokenizer(("<x>",)).save_pretrained(shifted)
    assert (
        run(config(ROWS, tokenizer={"path": str(shifted)})).identity != run(config(ROWS)).identity
    )


def test_another_mask_over_the_same_tokens_gives_another_identity(config, run, monkeypatch):
    class WithoutEnd(ChatEncoder):
        def encode(self, *arguments):
            encoded = super().encode(*arguments)
            for _, mask in encoded:
                mask[np.flatnonzero(mask)[-1]] = False
            return encoded

    before = run(config(ROWS)).identity
    monkeypatch.setattr("sftmix.data.prepare.ChatEncoder", WithoutEnd)
    assert run(config(ROWS)).identity != before


def test_another_group_gives_another_identity(config, run):
    """Evaluation reports by group, and is not run again for data of the same identity."""
    first, second = (
        run(config([row(f"{n}?", group=group) for n in range(9)])) for group in ("maths", "logic")
    )
    assert {example["group"] for example in first.kept.values()} == {"maths"}
    assert {example["group"] for example in second.kept.values()} == {"logic"}
    assert first.identity != second.identity


def settings(config):
    return fingerprint(data_settings(config))


def test_the_settings_change_with_the_content_of_a_file_and_of_the_tokenizer(tmp_path, config):
    folder = tmp_path / "tokenizer"
    character_tokenizer().save_pretrained(folder)
    template = tmp_path / "template.jinja"
    template.write_text("one")
    made = config(ROWS, tokenizer={"path": str(folder)}, chat_template=str(template))
    seen = [settings(made)]
    config(ROWS)  # writes the file again, the same
    assert settings(made) == seen[0]
    config(ROWS[1:])
    seen.append(settings(made))
    template.write_text("two")
    seen.append(settings(made))
    (folder / "tokenizer_config.json").write_text("{}")
    seen.append(settings(made))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"overlong": "drop"},
        {"held_out_share": 0.5},
        {"limit": 5},
        {"format": "prompt"},
        {"columns": {"group": "completion"}},
        {"seed": 1},
        {"chat_template": "chatml"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_settings_change_with_everything_that_makes_the_data(config, change):
    assert settings(config(ROWS, **change)) != settings(config(ROWS))


def test_the_settings_of_generated_data_change_with_the_generator_and_the_trained_tokenizer(config):
    def made(num_train=10, vocab_size=300):
        return settings(
            config(
                generator={"num_train": num_train, "num_held_out": 2},
                tokenizer={"train": {"vocab_size": vocab_size}},
            )
        )

    assert made() == made()
    assert len({made(), made(num_train=11), made(vocab_size=301)}) == 3


def check_against_encoder(prepared, tokenizer):
    """Compares every row of the Arrow files with what the encoder gives for its messages."""
    encoder = ChatEncoder(tokenizer)
    for example_id, example in prepared.kept.items():
        messages = tuple(json.loads(example["messages"]))
        assert parts_of(example_id)[0] == content_hash(messages)
        [(ids, mask)] = encoder.encode([Example(example_id, messages, "file:1")])
        ids, mask = ids[: example["num_tokens"]], mask[: example["num_tokens"]]
        assert example["input_ids"] == ids.tolist() and example["response_mask"] == mask.tolist()
        assert (
            example["num_tokens"] == len(ids) and example["num_response_tokens"] == mask.sum() > 0
        )


def test_the_arrow_files_hold_what_the_encoder_gives(tmp_path, config, run):
    rows = [row(r["prompt"], r["completion"], group=f"mod {n % 3}") for n, r in enumerate(ROWS)]
    prepared = run(
        config([*rows, row("why", "r" * 500), rows[0]], held_out_share=0.25, max_length=200)
    )
    tokenizer = tokenizer_from(tmp_path / "data" / "tokenizer")
    check_against_encoder(prepared, tokenizer)
    assert prepared.train and prepared.held_out
    for n, r in enumerate(rows):
        example = prepared.kept[id_of(r)]
        assert (
            example["place"].endswith(f"rows.jsonl:{n + 1}")
            and example["group"] == f"mod {n % 3}"
            and not example["is_noisy"]
        )
        assert json.loads(example["messages"])[1] == {
            "role": "assistant",
            "content": r["completion"],
        }
        learnt = [
            token
            for token, carries_loss in zip(
                example["input_ids"], example["response_mask"], strict=True
            )
            if carries_loss
        ]
        assert tokenizer.decode(learnt) == r["completion"] + tokenizer.eos_token


def test_rows_are_found_by_number_as_arrays(tmp_path, config, run):
    prepared = run(config(ROWS, held_out_share=0.25))
    examples = TokenisedExamples(tmp_path / "data" / "train.arrow")
    assert examples.example_ids.to_pylist() == list(prepared.train) and len(examples) == len(
        prepared.train
    )
    for index, example in enumerate(prepared.train.values()):
        ids, mask = examples.tokens(index)
        assert ids.dtype == np.int32 and mask.dtype == bool
        assert ids.tolist() == example["input_ids"] and mask.tolist() == example["response_mask"]
        assert (
            examples.num_tokens[index] == len(ids)
            and examples.num_response_tokens[index] == mask.sum()
        )


def test_a_conversation_learns_all_of_its_answers_and_an_empty_one_drops_it(tmp_path, config, run):
    def turns(*contents):
        return {
            "messages": [
                {"role": ("user", "assistant")[n % 2], "content": text}
                for n, text in enumerate(contents)
            ]
        }

    prepared = run(
        config(
            [
                turns("a", "one", "b", "two", "trailing"),
                turns("c", "three"),
                turns("d", "four", "e", " "),
            ],
            held_out_share=0,
        )
    )
    tokenizer = tokenizer_from(tmp_path / "data" / "tokenizer")
    learnt = [
        "".join(
            tokenizer.decode([t])
            for t, m in zip(e["input_ids"], e["response_mask"], strict=True)
            if m
        )
        for e in prepared.train.values()
    ]
    assert learnt == ["one</s>two</s>", "three</s>"]
    assert prepared.summary.dropped == {"empty response": 1}


def test_bad_rows_are_skipped_where_that_is_asked_for_and_written_down(tmp_path, config, run):
    prepared = run(config([row("a"), row(None), *ROWS], on_error="skip"))
    [line] = (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert skipped["place"].endswith("rows.jsonl:2") and skipped["row"] == row(None)
    assert "is null, expected text" in skipped["problem"]
    summary = prepared.summary
    assert summary.num_skipped == 1 and summary.num_read == len(ROWS) + 2
    assert "1 skipped as bad rows (data/skipped.jsonl)" in summary.lines()


def test_a_row_that_the_template_refuses_is_one_row(tmp_path, config, run):
    template = tmp_path / "no_system.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    )
    refused = {"prompt": "p", "completion": "r", "system": "y"}
    given = config([*ROWS, refused], chat_template=str(template))
    with pytest.raises(DataError) as caught:
        run(given)
    first, last = str(caught.value).splitlines()
    assert first.endswith(
        f"rows.jsonl:{len(ROWS) + 1}: the chat template refuses the conversation: no system."
    )
    assert last.startswith("1 bad row.")


def test_what_is_not_used_is_said_once_with_its_number(config, run):
    prepared = run(config([{**r, "id": n} for n, r in enumerate(ROWS)]))
    [note] = prepared.summary.notes
    assert f"not used, with the number of rows: id ({len(ROWS)})" in note
    assert not run(config(ROWS)).summary.notes
    with pytest.raises(DataError, match=r"names \['nr'\], which no row has"):
        run(config(ROWS, ignore_columns=["nr"]))
    turns = [{"role": "user", "content": "p", "name": "x"}, {"role": "assistant", "content": "r"}]
    rows = [{"messages": [*turns, {"role": "user", "content": str(n)}, turns[1]]} for n in range(9)]
    [note] = run(config(rows)).summary.notes
    assert "messages.name (9)" in note
    assert not run(config(rows, ignore_columns=["messages.name"])).summary.notes
    with pytest.raises(
        DataError, match=r"names \['messages.nam'\], which no row has.*messages.name"
    ):
        run(config(rows, ignore_columns=["messages.nam"]))


def test_bad_rows_of_all_files_are_listed_together(tmp_path, config, run):
    write(tmp_path / "first.jsonl", [row("a"), row(None), row("b")])
    write(tmp_path / "second.jsonl", [{"question": "q", "answer": "a"}, row("c")])
    with pytest.raises(DataError) as caught:
        run(
            config(
                sources=[{"path": str(tmp_path / name)} for name in ("first.jsonl", "second.jsonl")]
            )
        )
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/first.jsonl:2: field 'prompt' is null, expected text (format prompt)",
        f"{tmp_path}/second.jsonl:2: no field 'question' (format qa)",
        "2 bad rows. Fix or remove them; bad rows are never skipped silently (data.on_error=skip"
        " leaves them out and lists them).",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the data holds no example"),
        (
            [row("a")],
            (
                "0 training examples are left; at least 2 are needed. 1 example read: 0 to train"
                " on, 1 held out"
            ),
        ),
        (
            [row("a"), row("b", ""), row("c", "")],
            "at least 2 are needed.* 2 dropped: empty response",
        ),
    ],
)
def test_too_little_data_is_refused_with_the_counts(config, run, rows, message):
    with pytest.raises(DataError, match=message):
        run(config(rows))


def test_a_trained_tokenizer_is_the_same_twice_and_is_saved_with_its_template(
    tmp_path, config, run
):
    made = config(
        generator={"num_train": 60, "num_held_out": 10}, tokenizer={"train": {"vocab_size": 330}}
    )
    first, again = run(made), run(made)
    assert first.identity == again.identity
    tokenizer = tokenizer_from(tmp_path / "data" / "tokenizer")
    assert len(tokenizer) == 330
    check_against_encoder(again, tokenizer)
    example = next(iter(again.train.values()))
    question, answer = (message["content"] for message in json.loads(example["messages"]))
    written = f"<s>### Instruction:\n{question}\n\n### Response:\n{answer}</s>\n\n"
    assert tokenizer.decode(example["input_ids"]) == written


def test_a_vocabulary_too_large_for_the_data_is_refused(config, run):
    with pytest.raises(
        DataError, match=r"Lower tokenizer.train.vocab_size \(now 5000\), or use more data"
    ):
        run(config(ROWS, tokenizer={"train": {"vocab_size": 5000}}))


def test_generated_data_goes_through_the_stage_with_its_noise_marked(config, run):
    settings = {"num_train": 50, "num_held_out": 10, "noisy_share": 0.4}
    train, held_out, noisy = generate(GeneratorConfig(**settings), seed=3)
    prepared = run(config(generator=settings, seed=3))
    assert list(prepared.train) == [e.example_id for e in train] and list(prepared.held_out) == [
        e.example_id for e in held_out
    ]
    assert {
        example_id for example_id, example in prepared.kept.items() if example["is_noisy"]
    } == noisy
    assert len(noisy) > 0 and [e["group"] for e in prepared.train.values()] == [
        e.group for e in train
    ]


@pytest.mark.skipif(
    not ALPACA_DATA.is_file(), reason="shared/data/alpaca_data.json is not beside the repository"
)
def test_all_of_the_real_alpaca_file_is_accounted_for(config, run):
    """The limit comes after reading and checking, so the counts are those of the whole file."""
    prepared = run(
        config(path=str(ALPACA_DATA), limit=1000, tokenizer={"train": {"vocab_size": 2000}})
    )
    assert prepared.summary.num_read == 52_002
    assert prepared.summary.dropped == {"empty response": 28}
    assert prepared.summary.num_left_out == 52_002 - 28 - 1000
