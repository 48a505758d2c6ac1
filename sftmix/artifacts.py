"""What one stage hands the next: folders with a manifest, published by rename.

A folder that holds no valid `manifest.json` does not exist for the pipeline. An output is written beside
its place, flushed to disk, given a manifest with the size and SHA-256 of every file, and then renamed; a
reader verifies before it trusts. The manifest's `fingerprint` says which inputs and settings made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sftmix import faults
from sftmix.errors import ArtifactError, counted
from sftmix.machine import accessing

MANIFEST = "manifest.json"
_may_publish: list[Callable[[], None]] = []
FORMAT = 1  # of the artifacts themselves; part of every fingerprint
VISIBLE_SECONDS = 90.0  # network file systems look again for a name that was not there within 60 s (NFS: acdirmax)
PACKAGES = ("sftmix", "torch", "deepspeed", "transformers", "datasets", "triton", "peft")


@dataclass(frozen=True)
class Manifest:
    """fingerprint: hash of inputs and settings. settings: what went into it, for people. digest: hash of the
    content, which the fingerprint of the next stage is made from. facts: numbers that the stage wants to pass on;
    `facts["identity"]`, where set, stands for the content (files that hold a date differ without meaning to)."""

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


def fingerprint(content: Any) -> str:
    """Returns the SHA-256 (hex) of any JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def publish(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Iterator[Path]:
    """Yields a staging folder; when the block ends without an error it replaces `folder` as a whole.

    `facts` may be filled inside the block. After an error, or a kill, `folder` is as it was before; only between two
    renames it is absent, and whole beside its place.
    """
    staging = folder.with_name(f".{folder.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    seal(staging, stage=stage, settings=settings, inputs=inputs, facts=facts)
    replace_folder(staging, folder)


def replace_folder(staging: Path, folder: Path) -> None:
    """Puts a sealed folder beside `folder` into its place."""
    old = folder.with_name(f".{folder.name}.old")
    discard(old)
    check_may_publish()
    faults.point("publish.aside")
    if folder.exists():
        folder.rename(old)
    faults.point("publish.rename")
    staging.rename(folder)
    faults.point("publish.done")
    sync_folder(folder.parent)
    discard(old)


def await_visible(path: Path) -> None:
    """Waits for what another node has written: a network file system shows a new name there at once and here a little later.

    Raises ArtifactError where it does not come.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ArtifactError(
                f"{path} is not seen by rank {os.environ.get('RANK', '0')} on {socket.gethostname()}, {VISIBLE_SECONDS:g} s after it was "
                "written: run.dir must be the same folder on every node. Name one on shared storage."
            )
        time.sleep(0.1)


def before_publishing(check: Callable[[], None] | None) -> None:
    """Sets what is called before anything is renamed into its place, and raises where this process must not (any more)."""
    _may_publish[:] = [check] if check else []


def check_may_publish() -> None:
    """Raises what the check of `before_publishing` raises."""
    for check in _may_publish:
        check()


def seal(
    folder: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    facts: dict[str, Any] | None = None,
) -> Manifest:
    """Flushes every file below `folder` and writes its manifest last. For folders that grow in place."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        with accessing(path), path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
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


def stage_fingerprint(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> str:
    """Returns what a stage's manifest must carry for its output to be used again."""
    return fingerprint({"format": FORMAT, "stage": stage, "settings": dict(settings), "inputs": dict(inputs or {})})


def read_manifest(folder: Path) -> Manifest | None:
    """Returns the folder's manifest, or None where there is none. Raises ArtifactError for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        parts = (manifest.settings, manifest.inputs, manifest.facts, manifest.versions, manifest.files, *manifest.files.values())
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("a part of it is no object")
        return manifest
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}). Remove the folder and run the stage again.") from None


def verify(folder: Path, *, digests: bool = True) -> Manifest:
    """Returns the manifest of a folder all of whose files are there, whole and unchanged.

    Raises ArtifactError that names the first file that is missing or differs. `digests=False` compares sizes only.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} has no {MANIFEST}: its stage has not finished. Run the stage first.")
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing, though {folder / MANIFEST} lists it. Remove {folder} and run the stage again.")
        size = path.stat().st_size
        if size != expected["size"]:
            raise ArtifactError(
                f"{path} has {counted(size, 'byte')}, expected {expected['size']:,}. Remove {folder} and run the stage again."
            )
        if digests and sha256_of_file(path) != expected["sha256"]:
            raise ArtifactError(f"{path} differs from what was written (SHA-256). Remove {folder} and run the stage again.")
    return manifest


def discard(folder: Path) -> None:
    """Removes a folder that its successor replaces, its manifest first, so that no half of it is ever trusted."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file by temporary file and rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with accessing(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns a line for each value that differs: `a.b: 1 before, 2 now`."""
    lines = []
    for key in sorted({*before, *now}, key=str):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif json.dumps(old, sort_keys=True, default=str) != json.dumps(new, sort_keys=True, default=str):
            lines.append(f"{prefix}{key}: {_shown(old)} before, {_shown(new)} now")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if value is not None else "nothing"
    return text if len(text) <= 100 else text[:100] + "..."


def versions() -> dict[str, str]:
    """Returns the installed versions of the packages that decide a run's numbers."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def commit() -> str | None:
    """Returns the git commit of this checkout with `+changes` where it was edited; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
