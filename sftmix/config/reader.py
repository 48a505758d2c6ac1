"""Read a YAML config with its bases and overrides. Every mistake is one line with file, line and
remedy.

A file may name others to build on, `base: other.yaml` or a list of them, by paths relative to
itself. They are merged in order, the file itself last (docs/recipes.md).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sftmix.config.messages import KeyPath, Locations, dotted, explain
from sftmix.config.schema import CHOICES, Config
from sftmix.config.shipped import find_config, nearest_config, packaged
from sftmix.errors import ConfigError

EVALUATED = Path("runs/evaluate")  # run folders of models that are only measured
RUN_CONFIG = "config.yaml"  # in a run folder: the resolved config of what it holds


class _Loader(yaml.SafeLoader):
    """The safe loader, which has no Python types, extended by numbers such as 2e-6, which YAML 1.1
    reads as text."""


class _Dumper(yaml.SafeDumper):
    """The matching dumper, which quotes text that looks like such a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, values: Mapping[str, Any] | None = None
) -> Config:
    """Returns the checked config of a YAML file merged over its bases, with `key.sub=value`
    overrides applied on top. path: a file, a run folder (whose own config is read), the name of a
    config of the package, or a model's Hugging Face folder, which is measured as it is. values: set
    by the command itself, by dotted key, after the overrides.

    Raises ConfigError for a missing file, YAML that does not parse, bases that name each other, a
    duplicate or unknown key, a wrong type or value, and settings that contradict each other.
    """
    folder = Path(path)
    is_run_folder = (folder / RUN_CONFIG).is_file()
    if not is_run_folder and (folder / "config.json").is_file():
        places: Locations = {}
        path = folder
        raw: dict[str, Any] = {
            "run": {"dir": str(EVALUATED / "-".join(folder.resolve().parts[-3:]).strip("/"))},
            "model": {"path": str(folder)},
            "data": {"held_out_share": 1.0},
            "evaluation": {"trained": False},
        }
    else:
        path = folder / RUN_CONFIG if is_run_folder else find_config(path)
        raw, places = read_layers(path)
    if "study" in raw:
        raise ConfigError(
            f"{places[('study',)]}: this is a study of several runs. Start it with"
            f" `sftmix study {path}`."
        )
    if is_run_folder:
        raw["run"] = {**raw.get("run", {}), "dir": str(folder)}  # the folder may have moved
    apply_overrides(raw, places, overrides)
    for name, value in (values or {}).items():
        _set(raw, places, name, value, f"`{name}`")
    return check_config(raw, places, path)


def read_layers(path: Path) -> tuple[dict[str, Any], Locations]:
    """Returns the content of a file merged over its bases, and where each key stands."""
    raw: dict[str, Any] = {}
    places: Locations = {}
    for layer, layer_places in _layers(path, (), set()):
        lay_over(raw, places, layer, layer_places, ())
    return raw, places


def apply_overrides(raw: dict[str, Any], places: Locations, overrides: Sequence[str]) -> None:
    """Sets what the command line gives as `key.sub=value`."""
    for override in overrides:
        _apply_override(raw, places, override)


def check_config(raw: dict[str, Any], places: Locations, path: Path) -> Config:
    """Returns the checked config. path: of the file, for errors without a place."""
    _inherit_train(raw)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        # An error in what `reference.train` inherits is reported at its line under `train`.
        places_of_errors = {detail["loc"] for detail in error.errors()}
        details = [
            detail
            for detail in error.errors()
            if detail["loc"][:2] != ("reference", "train")
            or ("train", *detail["loc"][2:]) not in places_of_errors
        ]
        raise ConfigError("\n".join(explain(detail, path, places) for detail in details)) from None


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML; loading it again gives an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )


def _layers(
    path: Path, chain: tuple[Path, ...], seen: set[Path]
) -> list[tuple[dict[str, Any], Locations]]:
    """Returns the content of a file after that of its bases; a file that several files name is
    merged once, at its first mention."""
    raw, places = _read_yaml(path)
    base, place = raw.pop("base", []), places.get(("base",), "")
    names = [base] if isinstance(base, str) else base
    if (
        not isinstance(names, list)
        or not all(isinstance(name, str) and name for name in names)
        or (place and not names)
    ):
        raise ConfigError(
            f"{place}: `base` is {base!r}; expected the path of a YAML file, relative to this one,"
            " or a list of them."
        )
    _forget(places, ("base",))
    chain = (*chain, path)
    layers = []
    for name in names:
        file = _beside(path, name)
        if not file.is_file():
            file = packaged(name) or file
        if not file.is_file():
            raise ConfigError(
                f"{place}: `base` names {name}, but there is no file {file}. {nearest_config(file)}"
            )
        ring = [known.resolve() for known in chain]
        if file.resolve() in ring:
            circle = " -> ".join(map(str, [*chain[ring.index(file.resolve()) :], file]))
            raise ConfigError(f"{place}: `base` goes in a circle: {circle}. Remove one of these.")
        if file.resolve() not in seen:
            seen.add(file.resolve())
            layers += _layers(file, chain, seen)
    return [*layers, (raw, places)]


def _beside(path: Path, name: str) -> Path:
    joined = path.parent / name
    short = Path(os.path.normpath(joined))  # `a/../b` as `b`, unless a link makes that another file
    return short if short.resolve() == joined.resolve() else joined


def lay_over(
    below: dict[str, Any],
    places: Locations,
    above: dict[str, Any],
    above_places: Locations,
    prefix: KeyPath,
) -> None:
    """Merges into `below` and its places: mappings merge key by key, other values replace, null
    removes."""
    for name, value in above.items():
        key = (*prefix, name)
        if isinstance(value, dict):
            if not isinstance(below.get(name), dict):
                _forget(places, key)
                below[name] = {}
            if key in above_places:
                places[key] = above_places[key]
            lay_over(below[name], places, value, above_places, key)
            continue
        _forget(places, key)
        # inside it, null is a value for transformers
        if value is None and name in below and "architecture" not in prefix:
            del below[name]
            continue
        below[name] = value
        places.update(
            {inside: place for inside, place in above_places.items() if inside[: len(key)] == key}
        )


def _forget(places: Locations, key: KeyPath) -> None:
    for inside in [place for place in places if place[: len(key)] == key]:
        del places[inside]


def _read_yaml(path: Path) -> tuple[dict[str, Any], Locations]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file. {nearest_config(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        places: Locations = {}
        if node is not None:
            _record_places(node, (), path, places)
        raw = _Loader(text).get_single_data()
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OSError,
    ) as error:  # ValueError: not UTF-8, an invalid date, too many digits
        text = " ".join(str(error).split()).replace('"<unicode string>"', str(path))
        raise ConfigError(f"{path}: not valid YAML: {text}") from None
    if not isinstance(raw, dict) or node is None:
        raise ConfigError(
            f"{path}: expected sections such as `run:`, `model:` and `data:`, found"
            f" {type(raw).__name__}."
        )
    return raw, places


def _record_places(node: yaml.Node, prefix: KeyPath, path: Path, places: Locations) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            place = f"{path}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(
                    f"{place}: a key is a list or a mapping, expected a word such as `run`."
                    " Correct it."
                )
            key = (*prefix, key_node.value)
            if key in places:
                raise ConfigError(
                    f"{place}: `{dotted(key)}` is defined twice (first at"
                    f" {places[key]}). Remove one."
                )
            places[key] = place
            _record_places(value_node, key, path, places)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[(*prefix, index)] = f"{path}:{item.start_mark.line + 1}"
            _record_places(item, (*prefix, index), path, places)


def _apply_override(raw: dict[str, Any], places: Locations, override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            f"override `{override}`: expected `key.sub=value`, for example `train.epochs=1`."
        )
    try:
        parsed = _Loader(value).get_single_data() if value else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"override `{override}`: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    _set(raw, places, name, parsed, f"override `{override}`")


def _set(raw: dict[str, Any], places: Locations, name: str, value: Any, place: str) -> None:
    """Sets a dotted key. place: the location for errors."""
    keys = name.split(".")
    section = raw
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(section.get(key), dict):
            if section.get(key) is not None:
                raise ConfigError(
                    f"{place}: `{'.'.join(keys[: depth + 1])}` is a value, not a section."
                )
            section[key] = {}
        section = section[key]
    section[keys[-1]] = value
    _forget(places, tuple(keys))  # replaces the value of the file
    for depth in range(len(keys)):  # errors in the value belong to the override
        places.setdefault(tuple(keys[: depth + 1]), place)


def _inherit_train(raw: dict[str, Any]) -> None:
    """`reference.train` names only what differs from `train`; which model is kept is none of it."""
    reference = raw.get("reference")
    if (
        isinstance(reference, dict)
        and isinstance(reference.get("train"), dict)
        and isinstance(raw.get("train", {}), dict)
    ):
        inherited = {k: v for k, v in raw.get("train", {}).items() if k not in CHOICES}
        reference["train"] = {**inherited, **reference["train"]}
