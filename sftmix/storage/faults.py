"""Fault injection for tests: SFTMIX_FAULT="site:rank:hit:action", several separated by commas.

At the `hit`-th time (from 1; `*`: every time) that rank `rank` (`*`: any) passes `site`, the action
happens:

    kill9        the process is killed, as by the kernel when memory runs out
    term         it gets SIGTERM;  usr1: SIGUSR1
    stop         it stops answering (SIGSTOP)
    exit0        it ends at once with exit code 0, as a stopped launcher does
    leave        it ends by `sys.exit(0)`
    raise        RuntimeError is raised
    enospc       OSError(ENOSPC) is raised;  likewise eio, edquot, erofs, eacces
    short-write  the site is told to write only a part at once, as the system may at any time
    sleep        it is late by SFTMIX_FAULT_SECONDS (6)
    hold         it waits for ever and holds the interpreter's lock
    segfault     it reads where nothing is;  abort: it calls abort()

Without the variable a site costs one dictionary look-up. A site is defined by its call:
`faults.point("...")`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable

VARIABLE, SECONDS = "SFTMIX_FAULT", "SFTMIX_FAULT_SECONDS"
SIGNALS = {
    "kill9": signal.SIGKILL,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "stop": signal.SIGSTOP,
}
ERRORS = {
    name: getattr(errno, name.upper()) for name in ("enospc", "eio", "edquot", "erofs", "eacces")
}
_hits: Counter[str] = Counter()


def point(site: str) -> bool:
    """Marks a place where a test can inject a fault. Returns whether a write here must be short."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return False
    _hits[site] += 1
    is_short = False
    for fault in wanted.split(","):
        name, rank, hit, action = fault.split(":")
        if (
            name == site
            and rank in ("*", os.environ.get("RANK", "0"))
            and hit in ("*", str(_hits[site]))
        ):
            is_short |= _act(site, action)
    return is_short


def _act(site: str, action: str) -> bool:
    others: dict[str, Callable[[], object]] = {
        "exit0": lambda: os._exit(0),
        "leave": lambda: sys.exit(0),
        "sleep": lambda: time.sleep(float(os.environ.get(SECONDS, "6"))),
        "hold": lambda: ctypes.PyDLL(None).sleep(100_000),
        "segfault": lambda: ctypes.string_at(0),
        "abort": os.abort,
        "short-write": lambda: None,
    }
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]), f"fault injected at {site}")
    elif action == "raise":
        raise RuntimeError(f"fault injected at {site}")
    elif action in others:
        others[action]()
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r}")
    return action == "short-write"
