"""What a stage is, and what a running stage sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.config.schema import Config
from sftmix.engine.ranks import Ranks
from sftmix.liveness.progress import Progress
from sftmix.liveness.run_lock import RunLock
from sftmix.liveness.stopping import StopRequest
from sftmix.storage import artifacts
from sftmix.storage.unfinished import Identity
from sftmix.train.meter import Meter

Facts = dict[str, Any]


@dataclass(frozen=True)
class StageContext:
    """What a running stage sees. It returns its facts: numbers for later stages, kept in the
    manifest.

    folder: where its output is written, on rank 0 only. inputs: the folders of the stages that it
    reads. work: for what must survive a kill; removed once the output is published. identity: of
    settings and inputs, the same on every rank. ranks: None for a stage that rank 0 runs alone
    before there are any. lock: on the ranks that lead a disk. meter: began with the stage.
    """

    config: Config
    folder: Path
    inputs: dict[str, Path]
    work: Path
    identity: Identity
    stop: StopRequest
    progress: Progress
    meter: Meter
    ranks: Ranks | None = None
    lock: RunLock | None = None

    @property
    def is_main(self) -> bool:
        """Is this the process that writes the output?"""
        return self.ranks is None or self.ranks.is_main

    @property
    def kept(self) -> Path:
        """A folder for finished files of the output, which survive a kill; the stage links them
        into `folder` at its end."""
        path = self.work / "kept"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def facts_of(self, stage: str) -> Facts:
        """Returns the facts in the manifest of an input stage."""
        return artifacts.read_facts(self.inputs[stage])


@dataclass(frozen=True)
class Stage:
    """name: as on the command line. folder: in the run folder. reads: stages whose output it needs.
    settings: what else its output depends on. run: the work. needs_engine: runs on all ranks.
    is_view: its output only shows its inputs, so it is made anew without a question when they
    change."""

    name: str
    folder: str
    reads: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    run: Callable[[StageContext], Facts]
    needs_engine: bool = True
    is_view: bool = False
