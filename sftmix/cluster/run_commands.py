"""Run the commands that start the ranks, until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence

from sftmix.cluster.local_ranks import wait_for_all
from sftmix.errors import INTERRUPTED, STOPPED

# for the other commands to end after one has; heartbeats have told their ranks
GRACE_SECONDS = 60.0


def run_commands(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Runs the commands side by side until all have ended, or until one has failed and the others
    had time to end. Returns 0, or the code of a command that failed, with 75 and 130 preferred. No
    command is left running, even after an interrupt."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            # In their own session, so that this process handles an interrupt from the terminal.
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
                )
            )
        codes = wait_for_all(processes, grace_seconds=GRACE_SECONDS)
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = [code for code in codes if code]
    return next((code for code in failed if code in (STOPPED, INTERRUPTED)), next(iter(failed), 0))
