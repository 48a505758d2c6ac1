"""The configs of the package. Users name them from any folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

CONFIGS = (Path(__file__).parent / "files").resolve()  # a link in a checkout, a folder in a wheel


def packaged(name: str | Path) -> Path | None:
    """Returns the file of the package with this name; None if there is none.

    A name is a path below configs/; `configs/` itself and `.yaml` may be left out."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        return None
    below = CONFIGS.joinpath(*(parts[1:] if parts[:1] == ("configs",) else parts))
    return next((file for file in (below, Path(f"{below}.yaml")) if file.is_file()), None)


def find_config(name: str | Path) -> Path:
    """Resolves a path or a name: an existing file, else a file of the package.

    Returns the path unchanged if there is neither."""
    path = Path(name)
    own = next((file for file in (path, Path(f"{path}.yaml")) if file.is_file()), None)
    return own or packaged(name) or path


def describe_configs() -> dict[str, str]:
    """Returns the first comment line of every YAML file of the package, by name."""
    described = {}
    for file in CONFIGS.rglob("*.yaml"):
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        described[file.relative_to(CONFIGS).as_posix().removesuffix(".yaml")] = first.lstrip("# ")
    return dict(sorted(described.items()))


def nearest_config(path: Path) -> str:
    """Returns a suggestion: the config with the most similar name, or what else to do."""
    # of two with one name, the one that runs before a part or a study
    deepest_first = sorted(describe_configs(), key=lambda name: -name.count("/"))
    known = {name.rpartition("/")[2]: name for name in deepest_first}
    known |= {other.name.removesuffix(".yaml"): str(other) for other in path.parent.glob("*.yaml")}
    near = difflib.get_close_matches(path.name.removesuffix(".yaml"), known, n=1)
    if near:
        return f"Did you mean {known[near[0]]}?"
    return "Give the path of a YAML file, or a name that `sftmix configs` lists."


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema (2020-12) of a config file. A file may leave out what its `base` has,
    so no section is required."""
    from sftmix.config.schema import Config

    schema = Config.model_json_schema()
    del schema["required"]
    names = {"type": "string"}
    schema["properties"]["base"] = {
        "description": "Config, or configs, that this one changes.",
        "anyOf": [names, {"type": "array", "items": names}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
