"""Rows of the usual instruction formats, turned into one shape: a list of messages.

    alpaca     instruction, input (optional), output, system (optional)
    dolly      instruction, context (optional), response
    prompt     prompt, completion
    qa         question, answer
    messages   messages: [{role, content}, ...]                 (OpenAI)
    sharegpt   conversations: [{from, value}, ...]

The format is detected from the columns of a source's first row, or set in the config; `columns`
maps a field of the format to a column of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sftmix.errors import DataError

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One conversation. example_id: hash of the messages, stable over files, order and versions; a
    second example with the same content gets the suffix `-2`. place: file and line. group: optional
    label (a skill, a topic) for evaluation by group."""

    example_id: str
    messages: tuple[Message, ...]
    place: str
    group: str | None = None

    @property
    def content_id(self) -> str:
        return self.example_id.partition("-")[0]


class BadRow(ValueError):
    """A row without the fields that its format needs."""


def content_hash(messages: tuple[Message, ...]) -> str:
    """Returns 32 hex digits of the SHA-256 of the roles and contents."""
    canonical = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def detect_format(row: dict[str, Any], place: str, columns: dict[str, str]) -> str:
    """Returns the name of the first format all of whose required fields the row has.

    Raises DataError that lists the row's columns and the formats' fields.
    """
    for name, (required, _, _) in FORMATS.items():
        if all(columns.get(field, field) in row for field in required):
            return name
    expected = "; ".join(
        f"{name}: {', '.join(required)}" for name, (required, _, _) in FORMATS.items()
    )
    raise DataError(
        f"{place}: no known format has the columns {sorted(row)}. Expected one of: {expected}. "
        "Name the format with `data.format` and map its fields with `data.columns`."
    )


def to_messages(
    row: dict[str, Any], format_name: str, columns: dict[str, str]
) -> tuple[tuple[Message, ...], str | None]:
    """Returns the messages and the group of a row. Raises BadRow with the reason."""
    required, optional, convert = FORMATS[format_name]
    fields: dict[str, Any] = {}
    for field in (*required, *optional, "group"):
        column = columns.get(field, field)
        if column in row:
            fields[field] = row[column]
        elif field in required or field in columns:
            raise BadRow(f"no field {column!r}")
    group = fields.pop("group", None)
    messages = convert(fields)
    try:
        "".join([*(message["content"] for message in messages), str(group)]).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("the text holds an unpaired surrogate, which is not a character") from None
    return tuple(messages), None if group is None else str(group)


def check_format(format_name: str, columns: dict[str, str]) -> None:
    """Raises DataError for an unknown format, or a mapping of fields that the format does not
    have."""
    if format_name not in ("auto", *FORMATS):
        raise DataError(f"data.format is {format_name!r}; expected auto, {', '.join(FORMATS)}.")
    chosen = FORMATS if format_name == "auto" else [format_name]
    known = {"group"}.union(*(FORMATS[name][0] + FORMATS[name][1] for name in chosen))
    unknown = sorted(set(columns) - known)
    if unknown:
        raise DataError(
            f"data.columns maps {unknown}, which format {format_name!r} does not have; it has"
            f" {sorted(known)}."
        )


def _text(fields: dict[str, Any], name: str, *, optional: bool = False) -> str:
    value = fields.get(name)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(
            f"field {name!r} is {'null' if value is None else type(value).__name__}, expected text"
        )
    return value


def _exchange(fields: dict[str, Any], question: str, answer: str, extra: str = "") -> list[Message]:
    instruction, context = _text(fields, question), _text(fields, extra, optional=True)
    system = _text(fields, "system", optional=True)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    head = [{"role": "system", "content": system}] if system.strip() else []
    return [
        *head,
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": _text(fields, answer)},
    ]


_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def _turns(fields: dict[str, Any], name: str, role_key: str, content_key: str) -> list[Message]:
    turns = fields[name]
    if not isinstance(turns, list) or not turns:
        raise BadRow(
            f"field {name!r} is {type(turns).__name__ if turns != [] else 'empty'}, expected a list"
            " of turns"
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise BadRow(f"turn {number} of {name!r} has no {role_key!r} and {content_key!r}")
        role, content = _ROLES.get(str(turn[role_key])), turn[content_key]
        if role is None:
            raise BadRow(
                f"turn {number} of {name!r} has the role {turn[role_key]!r}, expected one of"
                f" {sorted(_ROLES)}"
            )
        if not isinstance(content, str):
            raise BadRow(f"turn {number} of {name!r} is {type(content).__name__}, expected text")
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow(f"no turn of {name!r} is the assistant's")
    while messages[-1]["role"] != "assistant":  # a trailing question has no answer to learn
        messages.pop()
    return messages


# name -> (required fields, optional fields, conversion); the order is the order of detection
FORMATS: dict[
    str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], list[Message]]]
] = {
    "messages": (("messages",), (), lambda f: _turns(f, "messages", "role", "content")),
    "sharegpt": (("conversations",), (), lambda f: _turns(f, "conversations", "from", "value")),
    "alpaca": (
        ("instruction", "output"),
        ("input", "system"),
        lambda f: _exchange(f, "instruction", "output", "input"),
    ),
    "dolly": (
        ("instruction", "response"),
        ("context",),
        lambda f: _exchange(f, "instruction", "response", "context"),
    ),
    "prompt": (("prompt", "completion"), (), lambda f: _exchange(f, "prompt", "completion")),
    "qa": (("question", "answer"), (), lambda f: _exchange(f, "question", "answer")),
}
