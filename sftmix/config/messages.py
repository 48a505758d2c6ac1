"""The wording of config errors: where, what was found, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from sftmix.config.schema import Config
from sftmix.errors import did_you_mean

KeyPath = tuple[str | int, ...]
Locations = dict[KeyPath, str]  # key -> "file:line", or "override `...`"


def explain(
    detail: Any, path: Path, places: Locations, others: Mapping[str, type[BaseModel]] | None = None
) -> str:
    """Returns one line for a mistake that pydantic found. detail: of `ValidationError.errors()`.
    path: of the config file. others: sections beside those of `Config`."""
    location: KeyPath = tuple(detail["loc"])
    place = next(
        (places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places),
        str(path),
    )
    name = dotted(location)
    match detail["type"]:
        case "extra_forbidden" if name == "base":
            return (
                f"{place}: `base` belongs into a file, where it names the files that it builds on."
                " Remove it here."
            )
        case "extra_forbidden":
            known = _fields_at(location[:-1], others or {}) + (
                ["base"] if len(location) == 1 else []
            )
            remedy = did_you_mean(str(location[-1]), known, f"Known keys here: {', '.join(known)}.")
            return f"{place}: `{name}` is an unknown key. {remedy}"
        case "missing":
            return (
                f"{place}: `{name}` is missing. Add it to the file, or give `{name}=...` on the"
                " command line."
            )
        case "value_error":
            where = f"`{name}`: " if name else ""
            return f"{place}: {where}{detail['ctx']['error']}."
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{place}: `{name}` is {detail['input']!r}: {message}."


def _fields_at(location: KeyPath, others: Mapping[str, type[BaseModel]]) -> list[str]:
    model: Any = others.get(str(location[0]), Config) if location else Config
    for key in location[1:] if model is not Config else location:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model
        )
    return list(model.model_fields)


def dotted(location: KeyPath) -> str:
    """Returns a key as a user writes it, `train.epochs`."""
    return ".".join(str(key) for key in location)
