"""Which files a source names: one file, a pattern, a folder, or a snapshot of a Hub data set."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

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
    """Files whose names have a split (`train-00000-of-00002.parquet`) are those of the split asked
    for; without such names, all are read."""
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
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


def _of_subset(folder: Path, files: list[Path], subset: str) -> list[Path]:
    chosen = [p for p in files if subset in p.relative_to(folder).parts[:-1]]
    if not chosen:
        raise DataError(f"{folder}: it has no folder {subset!r} (`subset` of the source).")
    return chosen


def _split_of(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return next((split for split, names in SPLITS.items() if words & names), None)
