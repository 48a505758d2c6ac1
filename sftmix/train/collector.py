"""Python's garbage collector runs between steps, not in the middle of one.

A collection in the middle of a step stops one rank while the others wait for it in a collective
(234 to 327 ms are reported in DeepSpeed issue 8451).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_between_steps() -> Iterator[None]:
    """Within the context, garbage is only collected by `gc.collect`. What was there before is not
    looked at until the end."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
