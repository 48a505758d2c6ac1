"""MT-Bench's single-answer grading: a judge gives each answer 1 to 10 (Zheng et al., NeurIPS 2023,
arXiv 2306.05685, section 3.1), in FastChat's files."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.errors import DataError
from sftmix.evaluation.judges.endpoint import Endpoint, Request
from sftmix.evaluation.judges.questions import Question, Questions
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_text

# FastChat's (fastchat/llm_judge/common.py)
WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
PARAMETERS = {"temperature": 0, "max_tokens": 2048}
RATING = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))
LOWEST, HIGHEST = 1.0, 10.0
ATTEMPTS = 3  # for an answer without a rating

_ASK = (
    "Rate the assistant's answer{last} for how helpful, correct, relevant, deep and clear it is."
    "{reference} Give a short reason first. Then give the rating on a line of its own, a number"
    " from 1 to 10 in this form: [[5]].\n\n"
)
_ONE = "<user>\n{question}\n</user>\n\n{given}<assistant>\n{answer}\n</assistant>"
_TWO = (
    "<user>\n{question_1}\n</user>\n\n{given}<assistant>\n{answer_1}\n</assistant>\n\n"
    "<user>\n{question_2}\n</user>\n\n<assistant>\n{answer_2}\n</assistant>"
)
_GIVEN_ONE = "<correct answer>\n{ref_answer_1}\n</correct answer>\n\n"
_GIVEN_TWO = "<correct answers>\n{ref_answer_1}\n\n{ref_answer_2}\n</correct answers>\n\n"
_COMPARE = " Compare it with the correct answer that is given, and look for mistakes."
_SYSTEM = "You rate answers of assistants fairly, and length alone does not impress you."


def _own(name: str, template: str, given: str, last: str) -> dict[str, str]:
    ask = _ASK.format(last=last, reference=_COMPARE if given else "")
    return {
        "name": name,
        "system_prompt": _SYSTEM,
        "prompt_template": ask + template.replace("{given}", given),
    }


# FastChat's names, so that its files and ours are read alike; the words are ours
OWN_PROMPTS = {
    prompt["name"]: prompt
    for prompt in (
        _own("single-v1", _ONE, "", ""),
        _own("single-math-v1", _ONE, _GIVEN_ONE, ""),
        _own("single-v1-multi-turn", _TWO, "", " to the second question"),
        _own("single-math-v1-multi-turn", _TWO, _GIVEN_TWO, " to the second question"),
    )
}


@dataclass(frozen=True)
class Grading:
    """How answers are graded. prompts: by FastChat's names. references: item -> correct answers.
    is_published: the prompts are those of a file of the user's, such as FastChat's."""

    prompts: Mapping[str, Mapping[str, str]]
    references: Mapping[str, Sequence[str]]
    is_published: bool


def read_grading(prompts: Path | None, references: Path | None) -> Grading:
    """Returns how to grade. prompts: FastChat's `judge_prompts.jsonl`; None for prompts of our own.
    references: its `reference_answer/gpt-4.jsonl`. Raises DataError for files of another form."""
    found: Mapping[str, Mapping[str, str]] = OWN_PROMPTS
    if prompts is not None:
        found = {row["name"]: row for row in _lines(prompts, ("name", "prompt_template"))}
        missing = [name for name in OWN_PROMPTS if name not in found]
        if missing:
            raise DataError(f"{prompts}: no prompt of the name {', '.join(missing)}.")
    correct = {}
    if references is not None:
        for row in _lines(references, ("question_id", "choices")):
            correct[str(row["question_id"])] = row["choices"][0]["turns"]
    return Grading(found, correct, prompts is not None)


def _lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    with accessing(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: no JSON: {error}.") from None
        if not isinstance(row, dict) or any(key not in row for key in keys):
            raise DataError(f"{path}:{number}: expected the keys {', '.join(keys)}.")
        rows.append(row)
    return rows


def request_of(
    row: Question, answers: Sequence[str], turn: int, grading: Grading, attempt: int = 0
) -> tuple[str, Request]:
    """Returns the name of the prompt and the request for the answer of a turn (0 or 1)."""
    correct = grading.references.get(row.item)
    needs = row.group in WITH_REFERENCE and correct is not None and len(correct) > turn
    name = f"single-{'math-' if needs else ''}v1{'-multi-turn' if turn else ''}"
    values = {"question": row.turns[0], "answer": answers[0]}
    for number, (question, answer) in enumerate(zip(row.turns, answers, strict=False), start=1):
        values |= {f"question_{number}": question, f"answer_{number}": answer}
    if correct is not None:
        values |= {f"ref_answer_{i}": text for i, text in enumerate(correct, start=1)}
    prompt = grading.prompts[name]
    try:
        asked = prompt["prompt_template"].format(**values)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"The prompt {name} asks for {error}, which there is not.") from None
    messages = [
        {"role": "system", "content": prompt.get("system_prompt", "")},
        {"role": "user", "content": asked},
    ]
    return name, Request([each for each in messages if each["content"]], PARAMETERS, attempt)


def rating_of(text: str | None) -> float | None:
    """Returns the rating in a judge's answer; None where there is none from 1 to 10."""
    for form in RATING:
        if (match := form.search(text or "")) is not None:
            value = float(match.group(1))
            return value if LOWEST <= value <= HIGHEST else None
    return None


@dataclass(frozen=True)
class Rating:
    """The rating of one answer. score: None where the judge gave none in `ATTEMPTS` attempts."""

    row: Question
    turn: int
    prompt: str
    asked: str
    judgment: str
    score: float | None


def requests_of(
    questions: Questions, answers: Mapping[str, Sequence[str]], grading: Grading
) -> list[tuple[Question, int, str, Request]]:
    """Returns question, turn, prompt and request of every answer of a model."""
    return [
        (row, turn, *request_of(row, answers[row.item], turn, grading))
        for row in questions.rows
        for turn in range(min(2, len(row.turns)))
    ]


def grade(
    endpoint: Endpoint,
    questions: Questions,
    answers: Mapping[str, Sequence[str]],
    grading: Grading,
    title: str,
) -> list[Rating]:
    """Returns the rating of every answer of a model. An answer without a rating is asked for
    again, `ATTEMPTS` times in all."""
    wanted = requests_of(questions, answers, grading)
    said = endpoint.ask([request for *_, request in wanted], title)
    for attempt in range(1, ATTEMPTS):
        unclear = [i for i, answer in enumerate(said) if rating_of(answer["text"]) is None]
        again = [Request(wanted[i][3].messages, wanted[i][3].parameters, attempt) for i in unclear]
        for i, answer in zip(unclear, endpoint.ask(again, title) if again else (), strict=True):
            said[i] = answer
    return [
        Rating(
            row,
            turn,
            name,
            request.messages[-1]["content"],
            answer["text"] or "",
            rating_of(answer["text"]),
        )
        for (row, turn, name, request), answer in zip(wanted, said, strict=True)
    ]


def write_judgments(path: Path, ratings: Mapping[str, Sequence[Rating]], judge: str) -> None:
    """Writes ratings for FastChat's `load_single_model_judgments`; -1 for none, as it does.
    ratings: by model."""
    lines = [
        {
            "question_id": rating.row.row["question_id"],
            "model": model,
            "judge": [judge, rating.prompt],
            "user_prompt": rating.asked,
            "judgment": rating.judgment,
            "score": -1 if rating.score is None else rating.score,
            "turn": rating.turn + 1,
            "tstamp": time.time(),
        }
        for model, found in ratings.items()
        for rating in found
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))
