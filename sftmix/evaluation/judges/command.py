"""`sftmix judge`: answers rated by a judge, several models side by side."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.errors import ConfigError
from sftmix.evaluation.judges import alpaca, mt_bench
from sftmix.evaluation.judges.answers import QUESTIONS
from sftmix.evaluation.judges.endpoint import Endpoint, Price, announce
from sftmix.evaluation.judges.questions import Questions, answers_path, read_answers, read_questions
from sftmix.evaluation.page import aligned, markdown
from sftmix.evaluation.statistics import LEVEL, item_difference
from sftmix.storage import provenance
from sftmix.storage.files import write_json, write_text

RESULTS = "judged.json"
WIDTH = 100
ONE_JUDGE = (
    f"In brackets: the {LEVEL:.0%} interval of the difference to the first model, paired by"
    " question. It speaks of these models, this judge and questions like these; whether one method"
    " is better takes several seeds of each."
)
OWN_WORDS = (
    "The prompts are sftmix's own, so ratings cannot be compared with published ones; --prompts"
    " takes FastChat's."
)


def judge_answers(options: argparse.Namespace) -> None:
    """Rates the answers of a folder of `sftmix answers`, and writes judged.json and judged.md.

    Raises ConfigError without consent to the price, or for what is missing; MachineError if the
    endpoint fails: what it has answered is kept, and paid for once.
    """
    folder: Path = options.folder
    if not (folder / QUESTIONS).is_file():
        raise ConfigError(f"{folder} holds no {QUESTIONS}: it is no folder of `sftmix answers`.")
    questions = read_questions(folder / QUESTIONS)
    names = sorted(path.stem for path in answers_path(folder, questions.kind, "x").parent.glob("*"))
    answers = {
        name: read_answers(answers_path(folder, questions.kind, name), questions)
        for name in _first_of(names, options.control)
    }
    label = provenance.fingerprint([options.judge, options.endpoint])[:8]
    endpoint = Endpoint(
        options.endpoint,
        options.judge,
        key=options.key_variable,
        cache=folder / ".judged" / f"{label}.jsonl",
        timeout=options.timeout,
        retries=options.retries,
        parallel=options.parallel,
    )
    price = Price(*(options.price or (None, None)))
    judge = _judge_mt_bench if questions.kind == "mt_bench" else _judge_alpaca
    found = judge(options, endpoint, questions, answers, price)
    spent = endpoint.spent()
    content = {
        "benchmark": questions.kind,
        "judge": options.judge,
        "answered_by": sorted(map(str, spent.models)),
        "prompt_tokens": spent.prompt_tokens,
        "answer_tokens": spent.answer_tokens,
        "usd": price.of(spent.prompt_tokens, spent.answer_tokens),
        "versions": provenance.versions(),
        **found,
    }
    write_json(folder / RESULTS, content)
    table = found["table"]
    titles, rows, note = table["titles"], table["rows"], table["note"]
    write_text(folder / "judged.md", f"{markdown(titles, rows)}\n{note}\n")
    print("", *aligned(titles, rows), "", textwrap.fill(note, WIDTH), "", sep="\n")
    cost = "" if content["usd"] is None else f", {content['usd']:.2f} USD"
    print(
        f"the judge has read {spent.prompt_tokens:,} tokens and written"
        f" {spent.answer_tokens:,}{cost}; {folder / RESULTS}"
    )


def _first_of(names: Sequence[str], control: str | None) -> list[str]:
    if not names:
        raise ConfigError("There are no answers to judge: `sftmix answers` writes them.")
    if control is None:
        return list(names)
    if control not in names:
        raise ConfigError(f"--control {control}: there are answers of {', '.join(names)}.")
    return [control, *(name for name in names if name != control)]


Answers = Mapping[str, Mapping[str, Sequence[str]]]


def _judge_mt_bench(
    options: argparse.Namespace,
    endpoint: Endpoint,
    questions: Questions,
    answers: Answers,
    price: Price,
) -> dict[str, Any]:
    grading = mt_bench.read_grading(options.prompts, options.references)
    wanted = [
        request
        for given in answers.values()
        for *_, request in mt_bench.requests_of(questions, given, grading)
    ]
    announce(endpoint, wanted, price, yes=options.yes)
    ratings = {
        name: mt_bench.grade(endpoint, questions, given, grading, name)
        for name, given in answers.items()
    }
    mt_bench.write_judgments(
        options.folder / "model_judgment" / f"{options.judge.replace('/', '-')}_single.jsonl",
        ratings,
        options.judge,
    )
    items = {
        name: {f"{r.row.item}/{r.turn + 1}": r.score for r in found}
        for name, found in ratings.items()
    }
    without = sum(
        r.row.group in mt_bench.WITH_REFERENCE and "math" not in r.prompt
        for found in ratings.values()
        for r in found
    )
    control = next(iter(items))
    titles = ["model", "rating", "difference", "turn 1", "turn 2", "no rating"]
    rows = []
    for name, found in ratings.items():
        scores = [r.score for r in found if r.score is not None]
        turns = [[r.score for r in found if r.turn == t and r.score is not None] for t in (0, 1)]
        rows.append(
            [
                name,
                _mean(scores),
                _difference(items[name], items[control], "{:+.2f}"),
                *map(_mean, turns),
                f"{len(found) - len(scores):,}",
            ]
        )
    note = f"Ratings of {options.judge}, 1 to 10. {ONE_JUDGE}"
    if not grading.is_published:
        note += f" {OWN_WORDS}"
    if without:
        note += (
            f" {without:,} answers of mathematics, reasoning and coding were rated without a"
            " correct answer beside them (--references)."
        )
    categories = {
        name: {
            group: _mean([r.score for r in found if r.row.group == group and r.score is not None])
            for group in dict.fromkeys(row.group for row in questions.rows)
        }
        for name, found in ratings.items()
    }
    return {
        "table": {"titles": titles, "rows": rows, "note": note},
        "categories": categories,
        "items": items,
    }


def _judge_alpaca(
    options: argparse.Namespace,
    endpoint: Endpoint,
    questions: Questions,
    answers: Answers,
    price: Price,
) -> dict[str, Any]:
    if options.against is None:
        raise ConfigError(
            "--against FILE is missing: the reference's outputs, which AlpacaEval compares with"
            " (AlpacaEval 2: those of gpt4_turbo), or another model's of `sftmix answers`."
        )
    annotator = alpaca.Annotator(options.annotator)
    reference = alpaca.rows_of(questions, read_answers(options.against, questions), "reference")
    outputs = {name: alpaca.rows_of(questions, given, name) for name, given in answers.items()}
    wanted = [
        request for rows in outputs.values() for request in annotator.requests(reference, rows)
    ]
    announce(endpoint, wanted, price, yes=options.yes)
    items, figures, reasons = {}, {}, {}
    for name, rows in outputs.items():
        found = annotator.judge(endpoint, reference, rows, name)
        path = options.folder / "annotations" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, found)
        items[name] = {
            row.item: None if each["preference"] is None else each["preference"] - 1
            for row, each in zip(questions.rows, found, strict=True)
        }
        figures[name], reasons[name] = alpaca.win_rates(found, options.length_data)
    control = next(iter(items))
    titles = ["model", "win rate", "difference", "length-controlled", "no verdict"]
    shown = []
    for name, rates in figures.items():
        missing = sum(value is None for value in items[name].values())
        shown.append(
            [
                name,
                _per_cent(rates, "win_rate"),
                _difference(items[name], items[control], "{:+.1%}"),
                _per_cent(rates, "length_controlled_winrate"),
                f"{missing:,}",
            ]
        )
    note = (
        f"Win rates against {options.against.name} by {options.judge}, annotator {annotator.name}"
        f" of alpaca_eval. {ONE_JUDGE}"
    )
    if why := next((reason for reason in reasons.values() if reason), None):
        note += f" No length-controlled rate: {why}."
    return {
        "table": {"titles": titles, "rows": shown, "note": note},
        "win_rates": figures,
        "items": items,
    }


def _mean(values: Sequence[float | None]) -> str:
    given = [value for value in values if value is not None]
    return f"{sum(given) / len(given):.2f}" if given else "-"


def _per_cent(rates: Mapping[str, float], key: str) -> str:
    return f"{rates[key]:.1f}%" if key in rates else "-"


def _difference(
    arm: Mapping[str, float | None], control: Mapping[str, float | None], form: str
) -> str:
    both = [i for i in arm if arm[i] is not None and control.get(i) is not None]
    if arm is control or len(both) < 2:
        return "-"
    found = item_difference(*(np.array([each[i] for i in both], float) for each in (arm, control)))
    mean, low, high = map(form.format, (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"
