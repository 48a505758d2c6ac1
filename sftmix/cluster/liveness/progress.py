"""What this rank is doing: written by the engine and the pipeline, read by the heartbeat thread,
and shown on a terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Position:
    """The position of a rank in its work. step: of training, from 1. ticks: micro-batches of this
    phase so far."""

    phase: str
    step: int = 0
    ticks: int = 0

    def __str__(self) -> str:
        if self.step:
            return f"{self.phase}, step {self.step}"
        return f"{self.phase}, micro-batch {self.ticks}" if self.ticks else self.phase


class Progress:
    """The position of this rank. can_stall: whether a position that does not change for long is an
    error.

    Assignments are atomic, so the heartbeat thread may read at any time.
    """

    def __init__(self, phase: str = "start", *, can_stall: bool = True):
        self.position = Position(phase)
        self.can_stall = can_stall

    def begin_phase(self, phase: str, *, can_stall: bool) -> None:
        """Starts a phase. can_stall: False while rank 0 works alone and the others wait."""
        self.position, self.can_stall = Position(phase), can_stall

    def begin_step(self, step: int) -> None:
        """Starts a step of training."""
        self.position = replace(self.position, step=step)

    def tick(self) -> None:
        """Counts a micro-batch or another piece of work."""
        self.position = replace(self.position, ticks=self.position.ticks + 1)


def progress_bar() -> Any:
    """Returns the rich progress bar that all stages share."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    # on a narrow terminal the losses are cut, not the step
    fixed = Column(no_wrap=True, min_width=7)
    return Progress(
        TextColumn("{task.description:>10}", table_column=Column(no_wrap=True, min_width=10)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=fixed),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5)),
        TextColumn("{task.fields[info]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
