"""Python's garbage collector runs between steps, not in the middle of one.

A collection in the middle of a step stops one rank while the others wait for it in a collective
(234 to 327 ms are reported in DeepSpeed issue 8451).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from types import TracebackType


class CollectorBetweenSteps:
    """Within the context, garbage is only collected by `collect`. What was there before is not
    looked at until the end. seconds: of all collections."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.seconds = 0.0

    def __enter__(self) -> CollectorBetweenSteps:
        self._was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()

    def collect(self) -> float:
        """Collects what has become garbage since the context began. Returns the seconds."""
        started = self._clock()
        gc.collect()
        seconds = self._clock() - started
        self.seconds += seconds
        return seconds
