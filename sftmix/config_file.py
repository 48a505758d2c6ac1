"""Reads a YAML config with overrides, and turns every mistake into one line with file, line and remedy."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from sftmix.config import Config
from sftmix.errors import ConfigError, did_you_mean

KeyPath = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """The safe loader, which knows no Python types, with numbers such as 2e-6, which YAML 1.1 takes for text."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart, which quotes text that looks like such a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Returns the checked config of a YAML file, with `key.sub=value` overrides applied on top.

    Raises ConfigError for a missing file, YAML that does not parse, a duplicate or unknown key, a wrong
    type or value, and settings that contradict each other.
    """
    path = Path(path)
    raw, places = _read_yaml(path)
    for override in overrides or []:
        _apply_override(raw, places, override)
    _inherit_train(raw)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        # What `reference.train` inherits from `train` is reported where it stands.
        inherited = {("train", *d["loc"][2:]) for d in error.errors() if d["loc"][:2] == ("reference", "train")}
        at_home = {d["loc"] for d in error.errors()} & inherited
        details = [d for d in error.errors() if d["loc"][:2] != ("reference", "train") or ("train", *d["loc"][2:]) not in at_home]
        raise ConfigError("\n".join(_explain(detail, path, places) for detail in details)) from None


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML; loading it again gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Give the path of a YAML file; see configs/."
        raise ConfigError(f"{path}: no such config file. {hint}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        places: dict[KeyPath, str] = {}
        if node is not None:
            _record_places(node, (), path, places)
        raw = _Loader(text).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, OSError) as error:
        text = " ".join(str(error).split()).replace('"<unicode string>"', str(path))
        raise ConfigError(f"{path}: not valid YAML: {text}") from None
    if not isinstance(raw, dict) or node is None:
        raise ConfigError(f"{path}: expected sections such as `run:`, `model:` and `data:`, found {type(raw).__name__}.")
    return raw, places


def _record_places(node: yaml.Node, prefix: KeyPath, path: Path, places: dict[KeyPath, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = (*prefix, key_node.value)
            place = f"{path}:{key_node.start_mark.line + 1}"
            if key in places:
                raise ConfigError(f"{place}: `{_dotted(key)}` stands twice (first at {places[key]}). Keep one of them.")
            places[key] = place
            _record_places(value_node, key, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*prefix, index)] = f"{path}:{item.start_mark.line + 1}"
            _record_places(item, (*prefix, index), path, places)


def _apply_override(raw: dict[str, Any], places: dict[KeyPath, str], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"override `{override}`: expected `key.sub=value`, for example `train.epochs=1`.")
    try:
        parsed = _Loader(value).get_single_data() if value else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"override `{override}`: the value is not valid YAML: {' '.join(str(error).split())}") from None
    keys = name.split(".")
    section = raw
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(section.get(key), dict):
            if section.get(key) is not None:
                raise ConfigError(f"override `{override}`: `{'.'.join(keys[: depth + 1])}` is a value, not a section.")
            section[key] = {}
        section = section[key]
    section[keys[-1]] = parsed
    for inside in [place for place in places if place[: len(keys)] == tuple(keys)]:
        del places[inside]  # what the file says there is replaced
    for depth in range(len(keys)):  # an error inside the value is the override's, not the file's
        places.setdefault(tuple(keys[: depth + 1]), f"override `{override}`")
    places[tuple(keys)] = f"override `{override}`"


def _inherit_train(raw: dict[str, Any]) -> None:
    """`reference.train` names only what differs from `train`."""
    reference = raw.get("reference")
    if isinstance(reference, dict) and isinstance(reference.get("train"), dict) and isinstance(raw.get("train", {}), dict):
        reference["train"] = {**raw.get("train", {}), **reference["train"]}


def _explain(detail: Any, path: Path, places: dict[KeyPath, str]) -> str:
    location: KeyPath = tuple(detail["loc"])
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), str(path))
    name = _dotted(location)
    match detail["type"]:
        case "extra_forbidden":
            known = _fields_at(location[:-1])
            remedy = did_you_mean(str(location[-1]), known, f"Known keys here: {', '.join(known)}.")
            return f"{place}: `{name}` is an unknown key. {remedy}"
        case "missing":
            return f"{place}: `{name}` is missing. Add it to the file, or give `{name}=...` on the command line."
        case "value_error":
            where = f"`{name}`: " if name else ""
            return f"{place}: {where}{detail['ctx']['error']}."
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"{place}: `{name}` is {detail['input']!r}: {message}."


def _fields_at(location: KeyPath) -> list[str]:
    model: Any = Config
    for key in location:
        if isinstance(key, int):
            continue
        annotation = model.model_fields[key].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return list(model.model_fields)


def _dotted(location: KeyPath) -> str:
    return ".".join(str(key) for key in location)
