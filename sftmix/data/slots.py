"""Where the texts of a conversation stand in what a chat template makes of it.

The conversation is rendered twice: as it is, and with a unique marker in place of every text. The
second one shows what the template writes between the texts, and so where each text begins and ends
in the first one. No template has to render the beginning of a conversation as it renders the whole.

A text is the content of a turn without white space around it, or what stands of it between images,
the thought before an assistant's content, and the name of a function that it calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sftmix.data.conversations import IMAGE, BadRow, Message, Tools

Render = Callable[[list[Message], Tools], str]

# Letters and digits only: nothing that a template strips, splits or escapes.
MARKER = re.compile(r"Zq7slot(\d{4,})q7Z")
_THOUGHT = re.compile(r"(\s*<think>\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)

Kind = Literal["content", "thought", "call"]


@dataclass(frozen=True)
class Slot:
    """A text of turn number `turn`. before: white space of the content in front of it."""

    turn: int
    kind: Kind
    text: str
    before: str = ""


@dataclass(frozen=True)
class Placed:
    """A slot at characters [start, stop) of the rendered text."""

    slot: Slot
    start: int
    stop: int


@dataclass(frozen=True)
class Rendered:
    """text: the conversation as the template renders it. placed: the slots in the order of the
    text. dropped_thoughts: number of thoughts that the template leaves out."""

    text: str
    placed: tuple[Placed, ...]
    dropped_thoughts: int = 0

    def of_turn(self, turn: int) -> list[Placed]:
        return [placed for placed in self.placed if placed.slot.turn == turn]


def place_slots(messages: tuple[Message, ...], tools: Tools, render: Render) -> Rendered:
    """Returns the rendered conversation and where its texts are. Raises BadRow if a text is not
    there exactly once and in order, and what `render` raises."""
    if any(MARKER.search(m["content"]) for m in messages):
        raise BadRow("it holds the text by which the response mask is found (Zq7slot...)")
    marked, slots = mark(messages)
    text, pattern = render(list(messages), tools), render(marked, tools)
    placed: list[Placed] = []
    end = place = 0
    for match in MARKER.finditer(pattern):
        between = pattern[end : match.start()]
        slot = slots[int(match[1])]
        start = place + len(between)
        if not text.startswith(between, place) or not text.startswith(slot.text, start):
            raise BadRow(
                f"the chat template changes the {_named(messages, slot)} or what is around it, so"
                f" that it cannot be found: {text[place : start + len(slot.text)][:60]!r}"
            )
        place, end = start + len(slot.text), match.end()
        placed.append(Placed(slot, start, place))
    if text[place:] != pattern[end:]:
        raise BadRow(
            f"the chat template ends differently with these texts: {text[place:][:60]!r} against"
            f" {pattern[end:][:60]!r} with others"
        )
    dropped = _check(messages, slots, [p.slot for p in placed])
    return Rendered(text, tuple(placed), dropped)


def mark(messages: tuple[Message, ...]) -> tuple[list[Message], list[Slot]]:
    """Returns the messages with a marker in place of every text, and the slots by their numbers."""
    slots: list[Slot] = []

    def marker(slot: Slot) -> str:
        slots.append(slot)
        return f"Zq7slot{len(slots) - 1:04d}q7Z"

    def marked_text(turn: int, kind: Kind, text: str) -> str:
        core = text.strip()
        if not core:
            return text
        before, _, after = text.partition(core)
        return before + marker(Slot(turn, kind, core, before)) + after

    marked: list[Message] = []
    for turn, message in enumerate(messages):
        new = dict(message)
        if message.get("reasoning_content"):
            new["reasoning_content"] = marked_text(turn, "thought", message["reasoning_content"])
        thought = _THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" else None
        if thought:
            head, inside, tail, rest = thought.groups()
            new["content"] = "".join(
                (
                    head,
                    marked_text(turn, "thought", inside),
                    tail,
                    marked_text(turn, "content", rest),
                )
            )
        else:
            content = message["content"]
            pieces = content.split(IMAGE) if message.get("images") else [content]
            new["content"] = IMAGE.join(marked_text(turn, "content", text) for text in pieces)
        if message.get("tool_calls"):
            new["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "name": marked_text(turn, "call", call["function"]["name"]),
                    },
                }
                for call in message["tool_calls"]
            ]
        marked.append(new)
    return marked, slots


def _check(messages: tuple[Message, ...], slots: list[Slot], found: list[Slot]) -> int:
    """Returns the number of thoughts that are not there. Raises BadRow if another text is not there
    once, or not in order; a system message may stand anywhere."""
    dropped = 0
    for slot in slots:
        times = sum(other is slot for other in found)
        if times == 1:
            continue
        is_last = not any(m["role"] == "assistant" for m in messages[slot.turn + 1 :])
        if times == 0 and slot.kind == "thought" and not is_last:
            dropped += 1
            continue
        wrong = "does not write" if times == 0 else f"writes {times} times"
        raise BadRow(
            f"the chat template {wrong} the {_named(messages, slot)}. Name another template, such"
            " as `chatml`, with tokenizer.chat_template, or leave the key out with"
            " data.ignore_columns"
        )
    order = [slot.turn for slot in found if messages[slot.turn]["role"] != "system"]
    if order != sorted(order):
        raise BadRow("the chat template writes the turns in another order")
    return dropped


def _named(messages: tuple[Message, ...], slot: Slot) -> str:
    role = messages[slot.turn]["role"]
    what = {
        "content": f"text of turn {slot.turn + 1} ({role})",
        "thought": f"thought (`reasoning_content`, or <think>) of turn {slot.turn + 1}",
        "call": f"`tool_calls` of turn {slot.turn + 1}",
    }
    return what[slot.kind]
