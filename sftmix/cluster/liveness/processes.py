"""Facts about processes of this machine: whether one still runs, and who started this one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed", "sftmix")
# A shell that started a run in the background may end long before it, and the run goes on: a shell
# is not a launcher, whatever its command line contains.
SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh", "busybox"})
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Process:
    """start: clock ticks from boot to its start. Together with the pid it identifies one process,
    even after pids are reused."""

    pid: int
    start: int
    command: str = ""

    @property
    def is_running(self) -> bool:
        return start_time(self.pid) == self.start


def start_time(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot; None if it does not run, or
    without /proc."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else fields[2]


def namespace() -> dict[str, str | None]:
    """Returns what two processes must share for one to look up the other's pid: host, boot and pid
    namespace."""
    here: dict[str, str | None] = {
        "host": socket.gethostname(),
        "boot_id": None,
        "pid_namespace": None,
    }
    with contextlib.suppress(OSError):
        here["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # containers may share host and boot, but not pids
        here["pid_namespace"] = str(Path("/proc/self/ns/pid").readlink())
    return here


def launchers() -> list[Process]:
    """Returns the ancestors that launch ranks, nearest first, up to the first that is not a
    launcher. Empty without /proc."""
    found: list[Process] = []
    pid = os.getppid()
    while pid > 0:
        fields, arguments = _stat(pid), _arguments(pid)
        command = " ".join(arguments)
        if (
            fields is None
            or not any(word in command for word in LAUNCHERS)
            or Path(arguments[0]).name.lstrip("-") in SHELLS
        ):
            break
        found.append(Process(pid, fields[2], command))
        pid = fields[1]
    return found


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends (Linux). It has no effect if the
    parent has already ended."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _stat(pid: int) -> tuple[str, int, int] | None:
    """Returns state, parent and start of a process; None if it does not exist, or without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 1 :].split()  # the name may contain spaces and brackets
    return fields[0], int(fields[1]), int(fields[19])


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []
