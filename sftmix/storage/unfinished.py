"""Unfinished work of a stage, kept in `work/STAGE` of the run folder until the output is published,
so that a killed run can resume.

It belongs to the settings and inputs that it was made with (`work.json`). Work of hours is not
discarded because a line of the config changed, nor is it resumed by a run that it does not
belong to: that run is refused, with the differences.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError, counted
from sftmix.storage import provenance
from sftmix.storage.checkpoints import CheckpointFolder
from sftmix.storage.files import read_record, write_json

RECORD = "work.json"


@dataclass(frozen=True)
class Identity:
    """The settings and inputs of a stage's work."""

    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, str]


def claim(folder: Path, stage: str, identity: Identity, *, discard: bool) -> None:
    """Prepares `folder` for a stage's work. Work of an earlier attempt with the same settings is
    kept, unless `discard` is set.

    Raises ArtifactError if there is work of other settings.
    """
    if not discard:
        refuse_if_other(folder, stage, identity)
    record = _read(folder)
    if discard or record is None or record["fingerprint"] != identity.fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(folder / RECORD, vars(identity))


def discard(folder: Path, fingerprint: str) -> None:
    """Removes the work of a published output. Keeps work of other settings, because the user may
    return to them."""
    record = _read(folder)
    if record is None or record["fingerprint"] == fingerprint:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_if_other(folder: Path, stage: str, identity: Identity) -> None:
    """Raises ArtifactError if `folder` has valuable work that was made with other settings or
    inputs."""
    record, progress = _read(folder), describe(folder)
    if record is None or progress is None or record["fingerprint"] == identity.fingerprint:
        return
    lines = provenance.differences(
        {"settings": record["settings"], "inputs": record["inputs"]},
        {"settings": identity.settings, "inputs": identity.inputs},
    )
    raise refusal(stage, progress, lines)


def refusal(stage: str, progress: str, differences: list[str]) -> ArtifactError:
    """Returns the error for work that would be lost."""
    changed = "\n".join(f"  {line}" for line in differences)
    return ArtifactError(
        f"the unfinished stage {stage} ({progress}) was made with other settings:\n{changed}\nPut"
        " them back to go on from there, name another run.dir, or discard it with"
        " --restart."
    )


def describe(folder: Path) -> str | None:
    """Describes the finished work; None if there is nothing of value."""
    steps = CheckpointFolder(folder / "checkpoints").steps()
    if steps:
        return f"saved after step {steps[0]}"
    num_units = len(list(folder.glob("checkpoint_*/unit_*.json")))
    return f"{counted(num_units, 'unit')} scored" if num_units else None


def _read(folder: Path) -> Mapping[str, Any] | None:
    content = read_record(folder / RECORD) or {}
    return content if {"fingerprint", "settings", "inputs"} <= content.keys() else None
