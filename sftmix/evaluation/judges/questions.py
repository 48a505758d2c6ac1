"""Questions and answers of MT-Bench and AlpacaEval, in the files that FastChat and alpaca_eval
read."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sftmix.errors import DataError
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_json, write_text
from sftmix.storage.provenance import fingerprint

Kind = Literal["mt_bench", "alpaca_eval"]
# FastChat's temperatures by category (fastchat/llm_judge/common.py); 0 is greedy
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}


@dataclass(frozen=True)
class Question:
    """A question of one or two turns. item: names it. group: category or data set."""

    item: str
    turns: tuple[str, ...]
    group: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Questions:
    """The questions of a file, in its order."""

    kind: Kind
    rows: tuple[Question, ...]

    @property
    def num_turns(self) -> int:
        """Most turns of a question."""
        return max(len(row.turns) for row in self.rows)


def read_questions(path: Path) -> Questions:
    """Returns the questions of a file: JSON lines of MT-Bench (`question_id`, `category`, `turns`),
    or a list of AlpacaEval (`instruction`, `dataset`).

    Raises DataError for another form: file, row, what was found and expected.
    """
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path}: no questions.")
    kind: Kind = "mt_bench" if "turns" in rows[0] else "alpaca_eval"
    found = []
    for number, row in enumerate(rows, start=1):
        keys = ("question_id", "turns") if kind == "mt_bench" else ("instruction",)
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(f"{path}: question {number} has not the keys {', '.join(keys)}.")
        turns = tuple(row["turns"]) if kind == "mt_bench" else (row["instruction"],)
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            raise DataError(f"{path}: question {number}: expected turns of text, found {turns!r}.")
        item = str(row["question_id"]) if kind == "mt_bench" else f"{number}"
        group = str(row.get("category" if kind == "mt_bench" else "dataset", ""))
        found.append(Question(item, turns, group, row))
    if len({row.item for row in found}) < len(found):
        raise DataError(f"{path}: a `question_id` stands twice.")
    return Questions(kind, tuple(found))


def _rows(path: Path) -> list[Any]:
    with accessing(path):
        text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path}: neither a list in JSON nor JSON lines: {error}.") from None


def answers_path(folder: Path, kind: Kind, model: str) -> Path:
    """Returns where a model's answers are. model: as part of a file name."""
    if kind == "mt_bench":  # as in FastChat's data/mt_bench
        return folder / "model_answer" / f"{model}.jsonl"
    return folder / "model_outputs" / f"{model}.json"


def write_answers(
    folder: Path, questions: Questions, model: str, turns: Mapping[str, Sequence[str]]
) -> Path:
    """Writes a model's answers: one JSON line per question for FastChat's `load_model_answers`, or
    a list for alpaca_eval's `model_outputs`. turns: item -> its answers. Returns the file."""
    path = answers_path(folder, questions.kind, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    if questions.kind == "mt_bench":
        lines = [
            {
                "question_id": row.row["question_id"],
                "answer_id": fingerprint([model, row.item, list(turns[row.item])])[:22],
                "model_id": model,
                "choices": [{"index": 0, "turns": list(turns[row.item])}],
                "tstamp": time.time(),
            }
            for row in questions.rows
        ]
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
    else:
        write_json(
            path,
            [
                {
                    "dataset": row.row.get("dataset", ""),
                    "instruction": row.row["instruction"],
                    "output": turns[row.item][0],
                    "generator": model,
                }
                for row in questions.rows
            ],
        )
    return path


def read_answers(path: Path, questions: Questions) -> dict[str, tuple[str, ...]]:
    """Returns the answers of a file by question: {item: turns}. It may hold more questions.

    Raises DataError for questions without an answer, with their number.
    """
    found: dict[str, tuple[str, ...]] = {}
    by_text = {row.turns[0]: row.item for row in questions.rows}
    for number, row in enumerate(_rows(path), start=1):
        try:
            if questions.kind == "mt_bench":
                found[str(row["question_id"])] = tuple(row["choices"][0]["turns"])
            elif row["instruction"] in by_text:
                found[by_text[row["instruction"]]] = (row["output"],)
        except (KeyError, TypeError, IndexError):
            raise DataError(f"{path}: row {number} is no answer of {questions.kind}.") from None
    missing = [row for row in questions.rows if len(found.get(row.item, ())) < len(row.turns)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(questions.rows)} questions have no answer, the first"
            f" is {missing[0].turns[0][:60]!r}."
        )
    return found
