"""Run the commands that start the ranks, until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from sftmix.errors import INTERRUPTED, STOPPED

# that other commands have to end, after one has: their ranks have heard of it by heartbeat
GRACE_SECONDS = 60.0


def run_commands(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Runs the commands side by side, until all have ended or one has failed and the others had
    time to end too. Returns 0, 75 or 130 where one ended with it, or another of their codes. None
    is left running here, not after an interrupt either."""
    processes: list[subprocess.Popen[bytes]] = []
    deadline = None
    try:
        for command in commands:
            # Of their own session: an interrupt from the terminal is ours to handle.
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        while None in (codes := [process.poll() for process in processes]):
            if deadline is None and any(codes):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = [code for code in codes if code]
    return next((code for code in failed if code in (STOPPED, INTERRUPTED)), next(iter(failed), 0))
