"""One conversation: its messages, and the text that a turn of a data file becomes.

A message is {role, content}, with these keys where they have something to say:

    reasoning_content   thought of an assistant before its content
    tool_calls          [{type, function: {name, arguments}}] of an assistant
    name, tool_call_id  of a tool's answer
    train               False: the turn carries no loss
    images              digests of its images; the content holds an `IMAGE` for each

Roles are system, user, assistant and tool; `text` for plain text, the only message of its example.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
Tools = tuple[dict[str, Any], ...]

PLAIN = frozenset(("role", "content"))
IMAGE = "\ufffc"  # Unicode's sign for an object within a text
TEXT_ROLE = "text"
# lower case -> role
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
REASONING = ("reasoning_content", "reasoning", "thinking")
# of an assistant's turn: 0 or false leaves it without loss
TRAIN_KEYS = ("weight", "train", "loss")
TOOL_KEYS = ("name", "tool_call_id")
IMAGE_KINDS = ("image", "image_url")


class BadRow(ValueError):
    """A row that cannot become an example, or an example that cannot be encoded."""


@dataclass(frozen=True)
class Example:
    """One conversation. example_id: hash of the messages and tools, stable over files, order and
    versions; a second example with the same content gets the suffix `-2`. place: file and line.
    group: optional label (a skill, a topic) for evaluation by group. tools: JSON schemas of the
    functions that the assistant may call."""

    example_id: str
    messages: tuple[Message, ...]
    place: str
    group: str | None = None
    tools: Tools = ()

    @property
    def content_id(self) -> str:
        return self.example_id.partition("-")[0]

    @property
    def images(self) -> list[str]:
        """Digests of the images, in order."""
        return [digest for m in self.messages for digest in m.get("images", ())]

    @property
    def is_text(self) -> bool:
        return self.messages[0]["role"] == TEXT_ROLE

    @property
    def trained_turns(self) -> list[int]:
        """Positions of the turns that carry loss."""
        return [
            n
            for n, m in enumerate(self.messages)
            if m["role"] in ("assistant", TEXT_ROLE) and m.get("train", True)
        ]


def content_hash(messages: tuple[Message, ...], tools: Tools = ()) -> str:
    """Returns 32 hex digits of the SHA-256 of the roles, the contents, and what else there is."""
    canonical: list[Any] = [
        [m["role"], m["content"], *([further] if (further := _further(m)) else [])]
        for m in messages
    ]
    if tools:
        canonical.append(["tools", list(tools)])
    return hashlib.sha256(json.dumps(canonical, ensure_ascii=False).encode()).hexdigest()[:32]


def _further(message: Message) -> dict[str, Any]:
    return {key: message[key] for key in sorted(message) if key not in PLAIN}


def read_turns(
    turns: Any, field: str, role_key: str, content_key: str, unused: set[str], ignored: set[str]
) -> list[Message]:
    """Returns the messages of a list of turns.

    unused: receives `field.key` of every key that no message uses. ignored: such names that are
    left out on purpose. Raises BadRow with the number of the turn.
    """
    if not isinstance(turns, list) or not turns:
        found = "empty" if turns == [] else type(turns).__name__
        raise BadRow(f"field {field!r} is {found}, expected a list of turns")
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"turn {number} of {field!r}"
        if not isinstance(turn, dict) or role_key not in turn:
            raise BadRow(f"{where} has no {role_key!r} and {content_key!r}")
        # Parquet and `datasets` write null for what a turn does not have.
        given = {
            key: value
            for key, value in turn.items()
            if (value is not None or key in (role_key, content_key))
            and f"{field}.{key}" not in ignored
        }
        message, used = _read_turn(given, where, role_key, content_key)
        unused.update(f"{field}.{key}" for key in given if key not in used)
        messages.append(message)
    return messages


def _read_turn(
    turn: dict[str, Any], where: str, role_key: str, content_key: str
) -> tuple[Message, set[str]]:
    """Returns the message, and the keys that it uses."""
    named = str(turn[role_key]).strip().lower()
    role = ROLES.get(named)
    if role is None:
        raise BadRow(f"{where} has the role {turn[role_key]!r}, expected one of {sorted(ROLES)}")
    used = {role_key, content_key}
    message: Message = {"role": role, "content": ""}
    content = turn.get(content_key)
    calls = _calls(turn, where, used) if role == "assistant" else []
    if named == "function_call":
        calls = [_call(_json(content, where, "a function call"), where)]
    elif content is not None or not calls:
        if content_key not in turn:
            raise BadRow(f"{where} has no {role_key!r} and {content_key!r}")
        message["content"], images = content_and_images(content, where)
        if images:
            message["images"] = images
    if role == "assistant":
        thought = next((turn[key] for key in REASONING if turn.get(key)), None)
        if thought is not None:
            if not isinstance(thought, str):
                raise BadRow(f"{where}: its reasoning is {type(thought).__name__}, expected text")
            message["reasoning_content"] = thought
        used.update(REASONING)
        if calls:
            message["tool_calls"] = calls
        if not _is_trained(turn, where, used):
            message["train"] = False
    elif role == "tool":
        message |= {key: turn[key] for key in TOOL_KEYS if key in turn}
        used.update(TOOL_KEYS)
    return message, used


def content_and_images(content: Any, where: str) -> tuple[str, list[Any]]:
    """Returns a text, or the joined texts of a list of parts with `IMAGE` for every image; and the
    images: what a part says of one, None for one of the row's column. Raises BadRow for anything
    else."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise BadRow(f"{where} is {type(content).__name__}, expected text")
        return content, []
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind in IMAGE_KINDS:
            texts.append(IMAGE)
            named = {key: part[key] for key in part if key not in ("type", "text", "index")}
            images.append(named if any(value is not None for value in named.values()) else None)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise BadRow(
                f"{where} has a part of the kind {kind!r}; expected text, or parts"
                ' {"type": "text", "text": ...}, or of the kind image'
            )
    return "".join(texts), images


def read_tools(value: Any) -> Tools:
    """Returns the tools of a row: a list of JSON schemas, or the JSON text of one."""
    if value is None or value == "":
        return ()
    tools = _json(value, "field 'tools'", "a list of tools")
    tools = [_json(tool, "field 'tools'", "a tool") for tool in tools] if tools else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("field 'tools' is not a list of JSON objects")
    return tuple(_as_function(tool) for tool in tools)


def _as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """Returns a tool in OpenAI's form, which templates read; ShareGPT files have the function
    alone."""
    is_bare = "function" not in tool and isinstance(tool.get("name"), str)
    return {"type": "function", "function": tool} if is_bare else tool


def _json(value: Any, where: str, what: str) -> Any:
    """Returns a value that is given as it is or as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow(f"{where} is text, but not the JSON of {what}: {error}") from None


def _calls(turn: dict[str, Any], where: str, used: set[str]) -> list[dict[str, Any]]:
    used.update(("tool_calls", "function_call"))
    given = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's older key, for one call
        given = [*given, turn["function_call"]]
    if not isinstance(given, list):
        raise BadRow(f"{where}: 'tool_calls' is {type(given).__name__}, expected a list")
    return [_call(call, where) for call in given]


def _call(call: Any, where: str) -> dict[str, Any]:
    """Returns a call in the shape that chat templates read: its arguments are an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where}: a call has no function with a 'name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{where}: 'arguments' of a call", "its arguments")
    kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {
        **kept,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _is_trained(turn: dict[str, Any], where: str, used: set[str]) -> bool:
    used.update(TRAIN_KEYS)
    for key in TRAIN_KEYS:
        if key in turn and turn[key] not in (0, 1):
            raise BadRow(f"{where}: {key!r} is {turn[key]!r}, expected 0 or 1, true or false")
    return all(turn.get(key, 1) for key in TRAIN_KEYS)


def texts_of(value: Any) -> Iterable[str]:
    """Yields every text in a JSON value, names of keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from texts_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_of(item)
