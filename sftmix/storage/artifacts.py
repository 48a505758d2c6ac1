"""Artifacts, through which stages exchange data: folders with a manifest, published by rename.

The pipeline ignores a folder without a valid `manifest.json`. An output is written to a temporary
folder next to its place, flushed to disk, given a manifest with the size and SHA-256 of every file,
and then renamed. A reader verifies it first. The manifest's `fingerprint` identifies its inputs and
settings.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError, counted
from sftmix.storage import faults
from sftmix.storage.failures import accessing
from sftmix.storage.files import sha256_of_file, sync_folder, write_json
from sftmix.storage.provenance import commit, fingerprint, versions

MANIFEST = "manifest.json"
FORMAT = 1  # format version of artifacts; part of every fingerprint


@dataclass(frozen=True)
class Manifest:
    """fingerprint: hash of inputs and settings. settings: what went into it, in readable form.
    digest: hash of the content, part of the next stage's fingerprint. facts: numbers for later
    stages; `facts["identity"]`, if set, is used instead of the content (files that contain a date
    differ although the content is equal)."""

    stage: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None

    @property
    def digest(self) -> str:
        identity = self.facts.get("identity")
        return fingerprint({"identity": identity} if identity else {"files": self.files})


@contextlib.contextmanager
def publish(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yields a staging folder; when the block ends without an error it replaces `folder` as a
    whole.

    `facts` may be filled inside the block. After an error or a kill, `folder` is unchanged, except
    that a kill between the two renames leaves it complete under its temporary name.
    """
    staging = new_staging(folder)
    yield staging
    seal(staging, stage=stage, settings=settings, inputs=inputs, facts=facts)
    replace_folder(staging, folder)


def new_staging(folder: Path) -> Path:
    """Returns an empty folder next to `folder`, to be sealed and put into its place."""
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def replace_folder(staging: Path, folder: Path, *, check: Callable[[], None] | None = None) -> None:
    """Puts a sealed folder into the place of `folder`. check: raises if this process may no longer
    publish."""
    old = folder.with_name(f".{folder.name}.old")
    discard(old)
    if check is not None:
        check()
    faults.point("publish.aside")
    if folder.exists():
        folder.rename(old)
    faults.point("publish.rename")
    staging.rename(folder)
    faults.point("publish.done")
    sync_folder(folder.parent)
    discard(old)


def seal(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Flushes every file below `folder` and writes its manifest last. For folders that are written
    in place."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        with accessing(path), path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {
            "size": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
    manifest = Manifest(
        stage=stage,
        fingerprint=stage_fingerprint(stage, settings, inputs),
        settings=dict(settings),
        inputs=dict(inputs or {}),
        files=files,
        facts=facts or {},
        versions=versions(),
        commit=commit(),
    )
    faults.point("publish.manifest")
    write_json(folder / MANIFEST, asdict(manifest))
    sync_folder(folder)
    return manifest


def stage_fingerprint(
    stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None
) -> str:
    """Returns the fingerprint that a stage's manifest must have for its output to be reused."""
    return fingerprint(
        {"format": FORMAT, "stage": stage, "settings": dict(settings), "inputs": dict(inputs or {})}
    )


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the folder's manifest, or None if there is none. Raises ArtifactError for a damaged
    one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        parts = (
            manifest.settings,
            manifest.inputs,
            manifest.facts,
            manifest.versions,
            manifest.files,
            *manifest.files.values(),
        )
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a part of it is not an object")
        return manifest
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}). Remove the folder and run the stage again."
        ) from None


def date_of(folder: Path) -> str:
    """Returns the day, in UTC, on which a published folder was finished."""
    written = (folder / MANIFEST).stat().st_mtime
    return datetime.datetime.fromtimestamp(written, datetime.UTC).date().isoformat()


def read_facts(folder: Path) -> dict[str, Any]:
    """Returns the facts in the manifest of a published folder."""
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} was verified before it was given to a stage"
    return manifest.facts


def verify(folder: Path, *, digests: bool = True) -> Manifest:
    """Verifies that all files of a folder are present and unchanged, and returns its manifest.

    Raises ArtifactError that names the first file that is missing or differs. `digests=False`
    compares sizes only.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(
            f"{folder} has no {MANIFEST}: its stage has not finished. Run the stage first."
        )
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing, though {folder / MANIFEST} lists it. Remove {folder} and run"
                " the stage again."
            )
        size = path.stat().st_size
        if size != expected["size"]:
            raise ArtifactError(
                f"{path} has {counted(size, 'byte')}, expected {expected['size']:,}. Remove"
                f" {folder} and run the stage again."
            )
        if digests and sha256_of_file(path) != expected["sha256"]:
            raise ArtifactError(
                f"{path} differs from what was written (SHA-256). Remove {folder} and run the stage"
                " again."
            )
    return manifest


def discard(folder: Path) -> None:
    """Removes a replaced folder, its manifest first, so that an incomplete one is never trusted."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
