"""Faults on demand, for tests of what survives them: SFTMIX_FAULT="site:rank:hit:action".

At the `hit`-th time (from 1; `*`: every time) that rank `rank` (`*`: any) passes `site`, the action happens:

    kill9   the process is killed, as by the kernel when memory runs out
    term    it gets SIGTERM
    raise   OSError(EIO) is raised;  enospc: OSError(ENOSPC)
    exit0   it ends at once with exit code 0, as a launcher does that was stopped itself
    stop    it stops answering (SIGSTOP)

Without the variable a site costs one dictionary look-up. Sites are named where they stand: `faults.point("...")`.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

VARIABLE = "SFTMIX_FAULT"
_hits: Counter[str] = Counter()


def point(site: str) -> None:
    """Marks a place where a test may let the process fail."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    name, rank, hit, action = wanted.split(":")
    if name != site or rank not in ("*", os.environ.get("RANK", "0")):
        return
    _hits[site] += 1
    if hit not in ("*", str(_hits[site])):
        return
    match action:
        case "kill9":
            os.kill(os.getpid(), signal.SIGKILL)
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit0":
            os._exit(0)
        case "raise":
            raise OSError(errno.EIO, f"fault injected at {site}")
        case "enospc":
            raise OSError(errno.ENOSPC, f"fault injected at {site}")
        case _:
            raise ValueError(f"{VARIABLE}: unknown action {action!r}")
