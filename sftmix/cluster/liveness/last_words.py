"""What a rank does before it aborts: write stacks to a file, print the first cause once, kill
silent ranks."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sftmix.cluster.liveness import processes

STACKS = "stacks"
# For a silent rank to write its stacks, which ends it. 1 s was too little on a busy machine, and
# a rank that does write them never takes all of it.
KILL_AFTER_SECONDS = 3.0
POLL_SECONDS = 0.05


class LastWords:
    """The last words of one rank. `folder/stacks/rank_0001.txt` is open from the start, so that it
    can be written while the GIL is held or when no more files can be opened."""

    def __init__(self, folder: Path, rank: int, token: str):
        self.folder = folder / STACKS
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / f"rank_{rank:04d}.txt"
        self._file = self._path.open("w", encoding="utf-8")
        # All ranks of this attempt know the token, and no other attempt does.
        self._first_cause = (
            self.folder / f"first_cause_{hashlib.sha256(token.encode()).hexdigest()[:8]}.txt"
        )
        if rank == 0:
            for old in self.folder.glob("first_cause_*.txt"):
                if not old.name.startswith(self._first_cause.stem):
                    old.unlink(missing_ok=True)
        # chain: the default action then ends the process. A suspended rank that is made to run
        # again for its stacks must not go on: it could finish a run that the others have ended.
        faulthandler.register(signal.SIGUSR2, file=self._file, all_threads=True, chain=True)

    def watch_itself(self, seconds: float) -> None:
        """Writes the stacks unless it is called again in time. Works while the GIL is held."""
        # Does not end the process: it may be late because its whole job was suspended.
        faulthandler.dump_traceback_later(seconds, file=self._file)

    def forget(self) -> None:
        """Undoes everything at a normal end."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()
        self._path.unlink(missing_ok=True)

    def print_once(
        self, cause: str, *, after_seconds: float = 0.0, cut_off: int | None = None
    ) -> None:
        """Prints the first cause, unless another rank does within `after_seconds` or has done so.
        cut_off: a silent rank on another host. It may have judged this one silent and printed that
        first, to a terminal that nobody sees, so its message is ignored."""
        first_cause = (
            self._first_cause
            if cut_off is None
            else self._first_cause.with_stem(f"{self._first_cause.stem}_{cut_off}")
        )
        deadline = time.monotonic() + after_seconds
        while time.monotonic() < deadline:
            if first_cause.exists():
                return
            time.sleep(POLL_SECONDS)
        text = "".join(f"sftmix: error: {line}\n" for line in cause.splitlines())
        try:
            descriptor = os.open(first_cause, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return
        except OSError:  # a full disk: printing twice is better than never
            pass
        else:
            with contextlib.suppress(OSError), os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
        # Bypass sys.stderr, whose lock the main thread may hold.
        _within(2.0, lambda: _write(2, text))

    def write_stacks(self, cause: str) -> None:
        """Writes the stacks of all threads."""
        with contextlib.suppress(OSError):
            _write(self._file.fileno(), f"{cause}\n\n")
            faulthandler.dump_traceback(self._file, all_threads=True)


def end_silent(process: processes.Process, *, ask_for_stacks: bool) -> None:
    """Kills a silent rank of this machine, after asking for its stacks. Does nothing if its pid now
    belongs to another process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if ask_for_stacks and process.is_running:
            _signal_main_thread(process.pid, signal.SIGUSR2)
            os.kill(process.pid, signal.SIGCONT)  # a suspended process writes nothing
        deadline = time.monotonic() + KILL_AFTER_SECONDS
        while process.is_running and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if process.is_running:
            os.kill(process.pid, signal.SIGKILL)


def _signal_main_thread(pid: int, number: int) -> None:
    # Any thread of a suspended process may take a signal, while the main thread already continues.
    # Sent to the main thread, the signal is handled where that thread was suspended.
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30
    if tgkill is None or tgkill(pid, pid, int(number)) != 0:
        os.kill(pid, number)


def end(code: int) -> NoReturn:
    """Ends this process immediately, without waiting for its other threads."""
    # Buffered output would be lost. A main thread that hangs in a write holds the lock.
    _within(0.5, sys.stdout.flush)
    os._exit(code)


def _within(seconds: float, action: Callable[[], object]) -> None:
    """Runs an action that may block, and stops waiting for it after a while."""

    def run() -> None:
        with contextlib.suppress(OSError, ValueError):
            action()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _write(descriptor: int, text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(descriptor, data) :]
