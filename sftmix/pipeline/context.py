"""The definition of a stage, and the context of a running stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sftmix.cluster.liveness.progress import Progress
from sftmix.cluster.liveness.run_lock import RunLock
from sftmix.cluster.liveness.stopping import StopRequest
from sftmix.config.schema import Config
from sftmix.engine.ranks import Ranks
from sftmix.storage import artifacts
from sftmix.storage.unfinished import Identity
from sftmix.train.meter import Meter

Facts = dict[str, Any]
ALONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@dataclass(frozen=True)
class StageContext:
    """The context of a running stage. The stage returns its facts: numbers for later stages, kept
    in the manifest.

    folder: of the output, on rank 0 only. inputs: folders of the stages that it reads. work: folder
    for what must survive a kill; removed after the output is published. identity: of settings and
    inputs, equal on every rank. ranks: ALONE for a stage that rank 0 runs before the ranks join.
    lock: on the ranks that lead a disk. meter: started with the stage.
    """

    config: Config
    folder: Path
    inputs: dict[str, Path]
    work: Path
    identity: Identity
    stop: StopRequest
    progress: Progress
    meter: Meter
    ranks: Ranks = ALONE
    lock: RunLock | None = None

    @property
    def kept(self) -> Path:
        """A folder for finished output files that survive a kill; the stage links them into
        `folder` at its end."""
        path = self.work / "kept"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def facts_of(self, stage: str) -> Facts:
        """Returns the facts in the manifest of an input stage."""
        return artifacts.read_facts(self.inputs[stage])


@dataclass(frozen=True)
class Stage:
    """name: as on the command line. folder: in the run folder. reads: stages whose output it needs.
    settings: what else its output depends on. function: as `file:function` in
    sftmix/pipeline/stages, imported when it runs: it may load torch and transformers. needs_engine:
    runs on all ranks. is_view: its output only presents its inputs, so it is replaced without
    asking when they change."""

    name: str
    folder: str
    reads: tuple[str, ...]
    settings: Callable[[Config], dict[str, Any]]
    function: str
    needs_engine: bool = True
    is_view: bool = False
