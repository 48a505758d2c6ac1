"""Rows of the usual instruction formats, turned into one shape: a list of messages.

    messages   messages: [{role, content}, ...], tools, system            (OpenAI, TRL)
    sharegpt   conversations: [{from, value}, ...], tools, system
    alpaca     instruction, output, input, system, history: [[question, answer], ...]
    dolly      instruction, response, context, system
    prompt     prompt, completion: two texts or two lists of messages; tools, system (TRL)
    choice     question, options, answer or answer_idx                    (MedQA, ARC)
    medmcqa    question, opa, opb, opc, opd, cop: 0 to 3                  (MedMCQA)
    qa         question, answer, system
    text       text: no turns, loss on everything          (continued pre-training)

The format is detected from the columns of a source's first row, or set in the config; `columns`
maps a field of the format to a column of the file. For models that read images every format also
has `images` (or `image`). Every column, and every key of a message, is
used, or named to the user, or refused.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.config.schema import DataSource
from sftmix.data.conversations import (
    TEXT_ROLE,
    BadRow,
    Message,
    Tools,
    content_hash,
    read_tools,
    read_turns,
)
from sftmix.data.images import ImageStore, place_images
from sftmix.errors import DataError

GROUP = "group"
IMAGES = ("images", "image")  # the images of a row's places


@dataclass(frozen=True)
class Columns:
    """Which columns of a file are read. mapping: field of the format -> column. only: nothing else
    is read, if it is not empty. ignored: columns, and `messages.KEY` for keys of messages, that are
    left out without a word."""

    mapping: dict[str, str]
    only: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def column(self, field: str) -> str:
        return self.mapping.get(field, field)

    def has_key(self, row: dict[str, Any], name: str) -> bool:
        """Returns whether a turn of the row has the key of `field.key`."""
        field, _, key = name.partition(".")
        turns = row.get(self.column(field))
        return isinstance(turns, list) and any(isinstance(t, dict) and key in t for t in turns)

    def given(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the columns that may be used."""
        return {
            name: value
            for name, value in row.items()
            if name not in self.ignored and (not self.only or name in self.only)
        }


def columns_of(source: DataSource) -> Columns:
    return Columns(source.columns, tuple(source.use_columns), tuple(source.ignore_columns))


@dataclass(frozen=True)
class Conversation:
    """What a row holds. unused: names of its columns and of keys of its messages that say something
    and are not used. unanswered: number of turns after the last answer, which are left out."""

    messages: tuple[Message, ...]
    tools: Tools = ()
    group: str | None = None
    unused: frozenset[str] = frozenset()
    unanswered: int = 0

    @property
    def content_id(self) -> str:
        return content_hash(self.messages, self.tools)


@dataclass(frozen=True)
class Format:
    """required, optional: fields. convert: takes the fields, a set that receives names of unused
    keys, and names that are ignored."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any], set[str], set[str]], list[Message]]

    @property
    def fields(self) -> set[str]:
        return {*self.required, *self.optional, GROUP, *IMAGES}


def detect_format(row: dict[str, Any], place: str, columns: Columns) -> str:
    """Returns the name of the first format all of whose required fields the row has. Plain text is
    only chosen where no other column belongs to a format.

    Raises DataError that lists the row's columns and the formats' fields, or names a mapped field
    that the format found does not have.
    """
    given = columns.given(row)
    for name, found in FORMATS.items():
        if not all(columns.column(field) in given for field in found.required):
            continue
        if name == "text" and any(columns.column(f) in given for f in FIELDS - found.fields):
            continue
        without_effect = sorted(set(columns.mapping) - found.fields)
        if without_effect:
            raise DataError(
                f"{place}: the columns {sorted(given)} are of the format {name}, so that"
                f" data.columns maps {without_effect} without any effect. Remove it, or name the"
                " format with `data.format`."
            )
        return name
    expected = "; ".join(f"{name}: {', '.join(f.required)}" for name, f in FORMATS.items())
    raise DataError(
        f"{place}: no known format has the columns {sorted(given)}. Expected one of: {expected}. "
        "Name the format with `data.format` and map its fields with `data.columns`."
    )


def read_row(
    row: dict[str, Any],
    format_name: str,
    columns: Columns,
    *,
    images: ImageStore | None = None,
    base: Path = Path(),
) -> Conversation:
    """Returns the conversation of a row. images: receives its images; None: models read text only.
    base: the folder from which paths of images start. Raises BadRow with the reason."""
    found = FORMATS[format_name]
    given = columns.given(row)
    if images is None and not set(IMAGES).isdisjoint(columns.mapping):
        raise BadRow("data.columns maps images, and the models of this config read text only")
    fields: dict[str, Any] = {}
    for field in (*found.required, *found.optional, GROUP, *(IMAGES if images else ())):
        column = columns.column(field)
        if column in given:
            fields[field] = given.pop(column)
        elif field in found.required or field in columns.mapping:
            raise BadRow(f"no field {column!r}")
    unused = {name for name, value in given.items() if value not in (None, "", [], {})}
    group = fields.pop(GROUP, None)
    tools = read_tools(fields.pop("tools", None))
    of_row = next((fields[name] for name in IMAGES if fields.get(name) is not None), None)
    fields = {name: value for name, value in fields.items() if name not in IMAGES}
    messages = found.convert(fields, unused, set(columns.ignored))
    place_images(messages, of_row, images, base)
    kept = len(messages)
    while kept and messages[kept - 1]["role"] not in ("assistant", TEXT_ROLE):
        kept -= 1
    conversation = Conversation(
        tuple(messages[:kept]),
        tools,
        None if group is None else str(group),
        frozenset(unused),
        len(messages) - kept,
    )
    if not kept:
        raise BadRow(f"no turn of {found.required[0]!r} is the assistant's")
    try:
        conversation.content_id.encode()
        str(conversation.group).encode()
    except UnicodeEncodeError:
        raise BadRow("the text holds an unpaired surrogate, which is not a character") from None
    return conversation


def check_format(format_name: str, columns: Columns) -> None:
    """Raises DataError for an unknown format, a mapping of fields that the format does not have, or
    columns that are both used and ignored."""
    if format_name not in ("auto", *FORMATS):
        raise DataError(f"data.format is {format_name!r}; expected auto, {', '.join(FORMATS)}.")
    known = FIELDS if format_name == "auto" else FORMATS[format_name].fields
    unknown = sorted(set(columns.mapping) - known)
    if unknown:
        raise DataError(
            f"data.columns maps {unknown}, which format {format_name!r} does not have; it has"
            f" {sorted(known)}."
        )
    both = sorted({*columns.only, *columns.mapping.values()} & set(columns.ignored))
    if both:
        raise DataError(f"data.ignore_columns names {both}, which are also used. Remove them.")
    missing = sorted(set(columns.mapping.values()) - set(columns.only)) if columns.only else []
    if missing:
        raise DataError(
            f"data.columns maps to {missing}, which data.use_columns does not name. Add them."
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


def _head(fields: dict[str, Any]) -> list[Message]:
    system = _text(fields, "system", optional=True)
    return [{"role": "system", "content": system}] if system.strip() else []


def _turn_pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _exchange(fields: dict[str, Any], question: str, answer: str, extra: str = "") -> list[Message]:
    instruction, context = _text(fields, question), _text(fields, extra, optional=True)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [*_head(fields), *_history(fields), *_turn_pair(prompt, _text(fields, answer))]


def _history(fields: dict[str, Any]) -> list[Message]:
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"field 'history' is {type(history).__name__}, expected a list of pairs")
    for number, pair in enumerate(history, start=1):
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            raise BadRow(f"pair {number} of 'history' is not [question, answer], two texts")
        messages += _turn_pair(*pair)
    return messages


def _conversation(role_key: str, content_key: str) -> Any:
    def convert(fields: dict[str, Any], unused: set[str], ignored: set[str]) -> list[Message]:
        [name] = set(fields) - {"system"}
        turns = read_turns(fields[name], name, role_key, content_key, unused, ignored)
        return _with_system(fields, turns)

    return convert


def _with_system(fields: dict[str, Any], turns: list[Message]) -> list[Message]:
    head = _head(fields)
    if head and turns[0]["role"] == "system":
        raise BadRow(
            "the column 'system' and the first turn both hold a system message. Leave one out, for"
            " example with data.ignore_columns"
        )
    return [*head, *turns]


def _prompt(fields: dict[str, Any], unused: set[str], ignored: set[str]) -> list[Message]:
    """Two texts, or two lists of messages, of which the prompt's answers carry no loss (TRL)."""
    if not isinstance(fields["prompt"], list):
        return _exchange(fields, "prompt", "completion")
    prompt, completion = (
        read_turns(fields[name], name, "role", "content", unused, ignored)
        for name in ("prompt", "completion")
    )
    for message in prompt:
        if message["role"] == "assistant":
            message["train"] = False
    return _with_system(fields, [*prompt, *completion])


def _options(value: Any) -> dict[str, str]:
    """Returns the text of each option by its letter: of an object, of a list of texts, of a list of
    {key, value}, or of two lists `label` and `text`."""
    if isinstance(value, dict) and {"label", "text"} <= set(value):
        value = dict(zip(value["label"], value["text"], strict=True))
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("key"): item.get("value") for item in value}
    if isinstance(value, list):
        value = dict(zip(string.ascii_uppercase, value, strict=False))
    if isinstance(value, dict):  # Parquet gives every row the letters of all
        value = {key: text for key, text in value.items() if text is not None}
    is_read = isinstance(value, dict) and len(value) > 1
    if not is_read or not all(isinstance(t, str) for pair in value.items() for t in pair):
        raise BadRow(
            "field 'options' holds no two options; expected an object of letters and texts, or a"
            " list of texts"
        )
    return dict(value)


def _number(value: Any) -> Any:
    """Returns a whole number that a table without types holds as text, else the value."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]+", value) else value


def _choice(fields: dict[str, Any], *_: set[str]) -> list[Message]:
    options = _options(fields["options"])
    letter = fields.get("answer_idx")
    answer = fields["answer"] if fields["answer"] in options.values() else _number(fields["answer"])
    if isinstance(answer, int) and not isinstance(answer, bool):
        letter, answer = (list(options)[answer] if 0 <= answer < len(options) else None), None
    if letter is None:
        by_text = [key for key, text in options.items() if text == answer]
        letter = answer if answer in options else by_text[0] if len(by_text) == 1 else None
    elif answer is not None and answer not in (letter, options.get(letter)):
        raise BadRow(f"'answer_idx' is {letter!r}, but 'answer' is not the text of this option")
    return _multiple_choice(fields, options, letter)


def _medmcqa(fields: dict[str, Any], *_: set[str]) -> list[Message]:
    options = {key[-1].upper(): _text(fields, key) for key in ("opa", "opb", "opc", "opd")}
    number = _number(fields["cop"])
    if number not in (0, 1, 2, 3):
        raise BadRow(
            f"field 'cop' is {number!r}, expected 0 to 3 (a to d, as the Hub's data set counts)"
        )
    return _multiple_choice(fields, options, "ABCD"[int(number)])


def _multiple_choice(fields: dict[str, Any], options: dict[str, str], letter: Any) -> list[Message]:
    """The question, a line `A. text` for every option, and as the answer the line of the right
    one."""
    if letter not in options:
        raise BadRow(f"the answer {fields.get('answer')!r} is none of the options {list(options)}")
    lines = {key: f"{key}. {text}" for key, text in options.items()}
    question = "\n".join([_text(fields, "question"), "", *lines.values()])
    return [*_head(fields), *_turn_pair(question, lines[letter])]


def _plain(fields: dict[str, Any], *_: set[str]) -> list[Message]:
    return [{"role": TEXT_ROLE, "content": _text(fields, "text")}]


# The order is the order of detection.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("system", "tools"), _conversation("role", "content")),
    "sharegpt": Format(("conversations",), ("system", "tools"), _conversation("from", "value")),
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "system", "history"),
        lambda f, *_: _exchange(f, "instruction", "output", "input"),
    ),
    "dolly": Format(
        ("instruction", "response"),
        ("context", "system"),
        lambda f, *_: _exchange(f, "instruction", "response", "context"),
    ),
    "prompt": Format(("prompt", "completion"), ("system", "tools"), _prompt),
    "choice": Format(("question", "options", "answer"), ("answer_idx", "system"), _choice),
    "medmcqa": Format(("question", "opa", "opb", "opc", "opd", "cop"), ("system",), _medmcqa),
    "qa": Format(
        ("question", "answer"), ("system",), lambda f, *_: _exchange(f, "question", "answer")
    ),
    "text": Format(("text",), (), _plain),
}
FIELDS = set[str]().union(*(found.fields for found in FORMATS.values()))
