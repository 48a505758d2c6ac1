"""Which files a source names: one file, a pattern, a folder, or a snapshot of a Hub data set."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sftmix.config.schema import DataSource
from sftmix.errors import DataError
from sftmix.storage.files import looks_local

COMPRESSED = (".gz", ".xz", ".zst")
JSON = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
KINDS = (*JSON, *TABLES, ".parquet")
# of `datasets.save_to_disk`
SAVED = ("state.json", "dataset_dict.json")
DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", *SAVED)
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


@dataclass(frozen=True)
class Files:
    """paths: the files to read, sorted. others: names of files of the folder that are not read."""

    paths: list[Path]
    others: list[str]


def kind_of(path: Path) -> str | None:
    """Returns the lower-case suffix that names the format of a file, without that of the
    compression; None for an unknown one."""
    endings = [s for s in (suffix.lower() for suffix in path.suffixes) if s not in COMPRESSED]
    return endings[-1] if endings and endings[-1] in KINDS else None


def is_saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in SAVED)


def find_files(source: DataSource) -> Files | None:
    """Returns the files of a source; None for a folder of `datasets.save_to_disk` and for a name on
    the Hub. Reads none of them.

    Raises DataError if there is none, or one of an unknown kind.
    """
    path = Path(source.path)
    if path.is_file():
        return Files([_known(path)], [])
    if path.is_dir():
        return None if is_saved(path) else _of_folder(path, source)
    if glob.has_magic(source.path):
        pattern = path.relative_to(path.anchor).as_posix()
        found = sorted(p for p in Path(path.anchor).glob(pattern) if p.is_file())
        if not found:
            raise DataError(f"data: no file matches {source.path}. Correct the pattern.")
        return Files([_known(file) for file in found], [])
    suffixes = {suffix.lower() for suffix in path.suffixes}
    if looks_local(source.path) or suffixes & {*KINDS, *COMPRESSED}:
        raise DataError(
            f"data: {source.path} does not exist. Give the path of a file or folder, or a Hub name"
            " such as `owner/name`."
        )
    return None


def _known(path: Path) -> Path:
    if kind_of(path) is None:
        raise DataError(
            f"{path}: unknown kind of file. Expected {', '.join(KINDS)} (also"
            f" {', '.join(COMPRESSED)})."
        )
    return path


def _of_folder(folder: Path, source: DataSource) -> Files:
    """Files are those that the folder's README names for the subset and split (`configs`, as on the
    Hub); else those whose names have the split (`train-00000-of-00002.parquet`); without such
    names, all are read."""
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    card = _of_card(folder, files, source)
    if card is not None:
        others = [p.relative_to(folder).as_posix() for p in files if p not in card]
        return Files([_known(file) for file in card], others)
    if source.subset is not None:
        files = _of_subset(folder, files, source.subset)
    data = [p for p in files if kind_of(p) and p.name not in DESCRIPTIONS]
    others = [p.relative_to(folder).as_posix() for p in files if p not in data]
    splits = {p: _split_of(p.relative_to(folder)) for p in data}
    named = sorted({split for split in splits.values() if split})
    if not data:
        raise DataError(
            f"{folder}: no file of data is in this folder. Expected {', '.join(KINDS)} (also"
            f" {', '.join(COMPRESSED)}), or what `datasets.save_to_disk` wrote."
        )
    if not named:
        return Files(data, others)
    chosen = [p for p in data if splits[p] == source.split]
    unnamed = [p.name for p in data if splits[p] is None]
    if not chosen or unnamed:
        problem = (
            f"{', '.join(unnamed)} has no split in its name, and others have"
            if chosen
            else f"no file has the split {source.split!r} in its name; there are {named}"
        )
        raise DataError(
            f"{folder}: {problem}. Set `split` of the source (data.sources), or give a pattern such"
            f" as {folder}/part-*.jsonl."
        )
    return Files(chosen, others)


def _of_card(folder: Path, files: list[Path], source: DataSource) -> list[Path] | None:
    """Returns the files that the README of a Hub data set names for the subset and split; None
    where it names none. Raises DataError for a subset or a split that it does not name."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        settings = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    found = settings.get("configs") if isinstance(settings, dict) else None
    named = {
        str(config["config_name"]): config
        for config in (found if isinstance(found, list) else [])
        if isinstance(config, dict) and "config_name" in config and config.get("data_files")
    }
    if not named:
        return None
    standard = [name for name, config in named.items() if config.get("default") is True]
    chosen = source.subset or next(
        (name for name in (*standard, "default") if name in named),
        next(iter(named)) if len(named) == 1 else None,
    )
    if chosen not in named:
        problem = f"names no {chosen!r}" if chosen else "names several configurations"
        raise DataError(
            f"{card} {problem}; there are {', '.join(sorted(named))}. Set `subset` of the source"
            " (data.sources)."
        )
    patterns = _patterns(named[chosen]["data_files"])
    if source.split not in patterns:
        raise DataError(
            f"{card}: the configuration {chosen!r} has no split {source.split!r}; there are"
            f" {', '.join(sorted(patterns))}. Set `split` of the source (data.sources)."
        )
    inner = str(named[chosen].get("data_dir") or "")
    paths = [
        p for pattern in patterns[source.split] for p in sorted((folder / inner).glob(pattern))
    ]
    kept = [p for p in dict.fromkeys(paths) if p in files]
    if not kept:
        raise DataError(
            f"{card} names {', '.join(patterns[source.split])} for the split {source.split!r}, and"
            f" {folder} has no such file. Download the whole snapshot."
        )
    return kept


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Returns the patterns of each split of `data_files`, in all its forms: a pattern, a list of
    patterns, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = ("train", entry)
        if isinstance(entry, dict):
            split, paths = str(entry.get("split", "train")), entry.get("path", [])
        for pattern in paths if isinstance(paths, list) else [paths]:
            patterns.setdefault(split, []).append(str(pattern))
    return patterns


def _of_subset(folder: Path, files: list[Path], subset: str) -> list[Path]:
    chosen = [p for p in files if subset in p.relative_to(folder).parts[:-1]]
    if not chosen:
        raise DataError(f"{folder}: it has no folder {subset!r} (`subset` of the source).")
    return chosen


def _split_of(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return next((split for split, names in SPLITS.items() if words & names), None)
