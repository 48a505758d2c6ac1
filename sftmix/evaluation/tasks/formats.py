"""Published files of tasks, turned into the rows that the harness's own task definitions take.

The prompts, answers and metrics are the harness's: `LocalTask.include` names its file. Only MedQA
with five options has none there; its prompt is that of four options with one more line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sftmix.errors import DataError
from sftmix.storage.failures import accessing

Row = dict[str, Any]
LETTERS = "ABCDE"
PUBMEDQA_TEST = "test_ground_truth.json"  # beside ori_pqal.json: the 500 questions of the test


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness on rows of a file.

    name: in results. include: the harness's definition, relative to its folder of tasks. rows: its
    input, each with a key `item` that names it. changes: what the definition gets anew.
    """

    name: str
    include: str
    rows: list[Row]
    changes: Mapping[str, Any] = field(default_factory=dict)


def read_task(name: str, path: Path) -> LocalTask:
    """Returns a task on the rows of its published file.

    name: one of `FORMATS`. Raises DataError for another name, and for rows of another form: file,
    row, what was found and what was expected.
    """
    if name not in FORMATS:
        raise DataError(
            f"--tasks {name}={path}: {name} has no reader of local files; known are"
            f" {', '.join(FORMATS)}. By its name alone the harness loads it from the Hub."
        )
    if not path.exists():
        raise DataError(f"--tasks {name}={path}: there is no such file.")
    task = FORMATS[name](path)
    if not task.rows:
        raise DataError(f"{path}: no rows, expected questions of {name}.")
    return task


def _medqa(path: Path) -> LocalTask:
    """`question`, `options` (letter: text), `answer_idx` (letter): 4 or 5 options, as published by
    Jin et al., Applied Sciences 11 (2021)."""
    rows, counts = [], set()
    for place, row in _json_lines(path, ("question", "options", "answer_idx")):
        options = row["options"]
        if isinstance(options, list):  # [{"key": "A", "value": text}, ...]
            options = {each.get("key"): each.get("value") for each in options}
        letters = LETTERS[: len(options)]
        if len(options) not in (4, 5) or sorted(options) != list(letters):
            raise _other(place, "options", list(options), "A to D, or A to E")
        if row["answer_idx"] not in options:
            raise _other(place, "answer_idx", row["answer_idx"], f"one of {', '.join(letters)}")
        counts.add(len(options))
        endings = {f"ending{i}": options[letter] for i, letter in enumerate(letters)}
        label = letters.index(row["answer_idx"])
        rows.append({"item": place, "sent1": row["question"], **endings, "label": label})
    if len(counts) > 1:
        raise DataError(f"{path}: some questions have 4 options and some 5; give two files.")
    if counts == {5}:
        listed = "".join(f"{letter}. {{{{ending{i}}}}}\n" for i, letter in enumerate(LETTERS))
        changes = {
            "doc_to_text": f"Question: {{{{sent1}}}}\n{listed}Answer:",
            "doc_to_choice": list(LETTERS),
        }
        return LocalTask("medqa_5options", "medqa/medqa.yaml", rows, changes)
    return LocalTask("medqa_4options", "medqa/medqa.yaml", rows)


def _pubmedqa(path: Path) -> LocalTask:
    """`ori_pqal.json`: {id: {"QUESTION", "CONTEXTS", "final_decision"}}, and beside it the test's
    ids, as published by Jin et al., EMNLP 2019. A folder means both; without ids all are taken."""
    file = path / "ori_pqal.json" if path.is_dir() else path
    content = _json(file)
    if not isinstance(content, dict):
        raise DataError(
            f"{file}: found a {type(content).__name__}, expected questions by their id."
        )
    listed = file.with_name(PUBMEDQA_TEST)
    ids: Iterable[str] = _json(listed) if listed.is_file() else content
    rows = []
    for item in ids:
        if item not in content:
            raise DataError(f"{listed}: question {item} is not in {file}.")
        row, place = content[item], f"{file}, question {item}"
        _check_keys(row, place, ("QUESTION", "CONTEXTS", "final_decision"))
        if row["final_decision"] not in ("yes", "no", "maybe"):
            raise _other(place, "final_decision", row["final_decision"], "yes, no or maybe")
        kept = {key: row[key] for key in ("QUESTION", "CONTEXTS", "final_decision")}
        rows.append({"item": item, **kept})
    return LocalTask("pubmedqa", "pubmedqa/pubmedqa.yaml", rows)


def _medmcqa(path: Path) -> LocalTask:
    """`question`, `opa` to `opd`, `cop`: the right option, counted from 1 in the files of the
    authors (Pal et al., CHIL 2022), from 0 on the Hub."""
    keys = ("question", "opa", "opb", "opc", "opd", "cop")
    found = list(_json_lines(path, keys))
    given = {row["cop"] for _, row in found}
    if found and not given <= set(range(5)):
        place, row = next((p, r) for p, r in found if r["cop"] not in range(5))
        raise _other(place, "cop", row["cop"], "0 to 3, or 1 to 4 (the test set has no answers)")
    if 0 in given and 4 in given:
        raise DataError(f"{path}: `cop` has 0 and 4; expected 0 to 3, or 1 to 4.")
    if found and not given & {0, 4}:
        raise DataError(
            f"{path}: `cop` is between 1 and 3 in all {len(found)} rows, so nothing tells whether"
            " it counts from 0 or from 1. Give the whole file; --limit takes its first questions."
        )
    first = 0 if 0 in given else 1
    rows = [
        {"item": row.get("id", place), **{key: row[key] for key in keys}, "cop": row["cop"] - first}
        for place, row in found
    ]
    return LocalTask("medmcqa", "medmcqa/medmcqa.yaml", rows)


def _gsm8k(path: Path) -> LocalTask:
    """`question` and `answer`, which ends with `#### number` (Cobbe et al., 2021)."""
    rows = []
    for place, row in _json_lines(path, ("question", "answer")):
        if "####" not in row["answer"]:
            raise _other(place, "answer", row["answer"][-40:], "`#### number` at its end")
        rows.append({"item": place, "question": row["question"], "answer": row["answer"]})
    return LocalTask("gsm8k", "gsm8k/gsm8k.yaml", rows)


FORMATS: dict[str, Callable[[Path], LocalTask]] = {
    "medqa": _medqa,
    "pubmedqa": _pubmedqa,
    "medmcqa": _medmcqa,
    "gsm8k": _gsm8k,
}


def _json(path: Path) -> Any:
    with accessing(path):
        text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: no JSON: {error}.") from None


def _json_lines(path: Path, keys: tuple[str, ...]) -> Iterable[tuple[str, Row]]:
    """Yields every row of a file with its place: one JSON object per line, or a list of them."""
    with accessing(path):
        text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        content: Iterable[tuple[int, Any]] = enumerate(_json(path), start=1)
    else:
        content = (
            (number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        )
    for number, row in content:
        place = f"{path.name}:{number}"
        if isinstance(row, str):
            try:
                row = json.loads(row)  # noqa: PLW2901
            except ValueError as error:
                raise DataError(f"{path}:{number}: no JSON: {error}.") from None
        _check_keys(row, place, keys)
        yield place, row


def _check_keys(row: Any, place: str, keys: tuple[str, ...]) -> None:
    if not isinstance(row, dict) or not set(keys) <= set(row):
        found = f"the keys {', '.join(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"{place}: found {found}, expected {', '.join(keys)}.")


def _other(place: str, key: str, value: Any, expected: str) -> DataError:
    return DataError(f"{place}: `{key}` is {value!r}, expected {expected}.")
