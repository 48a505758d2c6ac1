"""`sftmix answers`: a model's answers to MT-Bench or AlpacaEval, resumed after a kill.

Batches are planned from the questions alone, and each has a seed of its own: a resumed run writes
the answers that an undisturbed one would have written, also sampled ones.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftmix.errors import ArtifactError, counted
from sftmix.evaluation.judges.generation import WRITERS, Writer
from sftmix.evaluation.judges.journal import Journal
from sftmix.evaluation.judges.questions import (
    TEMPERATURES,
    Question,
    Questions,
    read_questions,
    write_answers,
)
from sftmix.evaluation.models import NamedModel, digest_of, models_of
from sftmix.storage import provenance
from sftmix.storage.files import write_text

QUESTIONS = "questions.jsonl"  # of the folder: what was asked, as it was given


def write_all_answers(options: argparse.Namespace) -> None:
    """Answers every question with every model. Finished models are left as they are.

    Raises ArtifactError if the folder has answers of other weights, questions or settings, unless
    options.force; ConfigError and DataError for what cannot be answered.
    """
    questions = read_questions(options.questions)
    if options.limit is not None:
        questions = Questions(questions.kind, questions.rows[: options.limit])
    folder = options.to
    models = models_of(options.models)
    rows = [dict(row.row) for row in questions.rows]
    journals = {}
    for model in models:
        settings = {
            "model": digest_of(model.source),
            "questions": provenance.fingerprint(rows),
            "temperature": options.temperature,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": options.batch_size,
            "seed": options.seed,
            "backend": options.backend,
        }
        path = folder / ".answers" / f"{model.file_name}.jsonl"
        journals[model] = Journal(path, settings, force=options.force)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / QUESTIONS, "".join(f"{json.dumps(row)}\n" for row in rows))
    for model, journal in journals.items():
        _answer(model, questions, journal, options)
        turns, ends = _finished(questions, journal.rows)
        path = write_answers(folder, questions, model.file_name, turns)
        said = f"{model.name}: {counted(len(turns), 'answer')} in {path}"
        for end, what in (
            ("length", f"cut at {options.max_new_tokens} tokens"),
            ("no room", "empty: the prompt fills the context"),
        ):
            if ends[end]:
                said += f"; {ends[end]:,} {what}"
        print(said, flush=True)


def _answer(
    model: NamedModel, questions: Questions, journal: Journal, options: argparse.Namespace
) -> None:
    from tqdm import tqdm

    size = options.batch_size or WRITERS[options.backend].batch_size
    done = _by_item(journal.rows)
    plan = list(_batches(questions, options, size))
    left = [
        (turn, batch) for turn, batch in plan if any((row.item, turn) not in done for row in batch)
    ]
    if not left:
        return
    writer: Writer = WRITERS[options.backend](model.source)
    total = sum(len(batch) for _, batch in left)
    with tqdm(total=total, desc=model.name, unit="answer", file=sys.stderr) as progress:
        for turn, batch in left:
            prompts = [writer.prompt_ids(_conversation(row, turn, done)) for row in batch]
            seed = provenance.fingerprint([options.seed, turn, [row.item for row in batch]])
            answers = writer.answer(
                prompts,
                max_new_tokens=options.max_new_tokens,
                temperature=_temperature(batch[0], questions, options),
                seed=int(seed[:8], 16),
            )
            rows = [
                {"item": row.item, "turn": turn, "text": answer.text, "end": answer.end}
                for row, answer in zip(batch, answers, strict=True)
            ]
            journal.add(rows)
            done |= _by_item(rows)
            progress.update(len(batch))


def _batches(
    questions: Questions, options: argparse.Namespace, size: int
) -> Iterator[tuple[int, Sequence[Question]]]:
    """Yields turn and questions of each batch: of one temperature, and of similar length."""
    for turn in range(questions.num_turns):
        groups: dict[float | None, list[Question]] = {}
        for row in questions.rows:
            if turn < len(row.turns):
                groups.setdefault(_temperature(row, questions, options), []).append(row)
        for group in groups.values():
            ordered = sorted(group, key=lambda row: (sum(map(len, row.turns)), row.item))
            for first in range(0, len(ordered), size):
                yield turn, ordered[first : first + size]


def _temperature(row: Question, questions: Questions, options: argparse.Namespace) -> float | None:
    if options.temperature is not None or questions.kind != "mt_bench":
        return options.temperature  # type: ignore[no-any-return]
    return TEMPERATURES.get(row.group)


def _conversation(
    row: Question, turn: int, done: Mapping[tuple[str, int], Mapping[str, Any]]
) -> list[dict[str, str]]:
    said = []
    for earlier in range(turn):
        said.append({"role": "user", "content": row.turns[earlier]})
        said.append({"role": "assistant", "content": done[row.item, earlier]["text"]})
    return [*said, {"role": "user", "content": row.turns[turn]}]


def _by_item(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    return {(row["item"], row["turn"]): row for row in rows}


def _finished(
    questions: Questions, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[str]], Counter[str]]:
    done = _by_item(rows)
    turns = {
        row.item: [done[row.item, turn]["text"] for turn in range(len(row.turns))]
        for row in questions.rows
    }
    if any((row.item, 0) not in done for row in questions.rows):
        raise ArtifactError("answers are missing that were written before")
    return turns, Counter(row["end"] for row in done.values())
