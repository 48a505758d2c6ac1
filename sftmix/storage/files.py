"""Crash-safe files: atomic writes, flushing, hashing, and waiting on network file systems."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError
from sftmix.storage.failures import accessing

# network file systems look again for a missing name within 60 s (NFS: acdirmax)
VISIBLE_SECONDS = 90.0


def looks_local(name: str) -> bool:
    """Returns whether a name that does not exist here was meant as a path, not as a name on the Hub
    (`owner/name`)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def read_record(path: Path) -> dict[str, Any] | None:
    """Returns the content of a JSON file; None if there is no file, or no JSON object in it."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file by temporary file and rename. Several processes may write the same one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with accessing(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def await_visible(path: Path) -> None:
    """Waits for a path that another node has written: a network file system may show a new name
    later on this node.

    Raises ArtifactError if it does not appear.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise ArtifactError(
                f"{path} is not seen by rank {os.environ.get('RANK', '0')} on"
                f" {socket.gethostname()}, {VISIBLE_SECONDS:g} s after it was written: run.dir must"
                " be the same folder on every node. Name one on shared storage."
            )
        time.sleep(0.1)
