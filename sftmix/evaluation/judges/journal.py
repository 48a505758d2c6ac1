"""A file of JSON lines that is added to as results come, and read again after a kill."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError
from sftmix.storage import provenance
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_text


class Journal:
    """Rows that one process writes, threads included. The first line holds the settings that they
    were made with.

    A last line that a kill has cut is dropped. Raises ArtifactError if the settings differ, unless
    force: then the file begins anew.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, force: bool = False):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        lines = self._whole_lines()
        before = json.loads(lines[0]) if lines else None
        differences = provenance.differences(before, settings) if before is not None else []
        if differences and not force:
            shown = "\n".join(f"  {line}" for line in differences)
            raise ArtifactError(
                f"{path} was begun with other settings:\n{shown}\nGive another folder, or replace"
                " what is there with --force."
            )
        if before is None or differences:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, f"{json.dumps(dict(settings))}\n")
            return
        self.rows = [json.loads(line) for line in lines[1:]]

    def _whole_lines(self) -> list[str]:
        """Returns the lines of the file, and cuts a last one that is not whole."""
        if not self.path.exists():
            return []
        with accessing(self.path):
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(self.path, len(whole))
        return whole.decode().splitlines()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, and returns when they are on disk."""
        text = "".join(f"{json.dumps(dict(row))}\n" for row in rows)
        with self._lock, accessing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            self.rows += [dict(row) for row in rows]
