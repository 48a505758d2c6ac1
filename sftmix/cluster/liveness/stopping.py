"""Requests to stop a run: a signal, its wall-clock limit, or a file in the run folder.

The training loop checks after every step, saves, and exits with code 75 (EX_TEMPFAIL), after which
batch systems can start it again, or with 130 after Control-C. The same signal again ends the
process at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sftmix.errors import INTERRUPTED, STOPPED

# start of the command in seconds since the epoch, for all its processes
STARTED = "SFTMIX_STARTED"
STOP_FILE = "stop"  # in the run folder: creating it asks the run to stop


class StopRequest:
    """Whether a stop was requested. reason: by what; None if there was no request."""

    def __init__(self, run_folder: Path, *, wall_clock_minutes: float | None = None):
        self._file = run_folder / STOP_FILE
        self._minutes = wall_clock_minutes
        try:
            self._started = float(os.environ.setdefault(STARTED, str(time.time())))
        except ValueError:  # not ours
            self._started = time.time()
        self._reason: str | None = None
        self._taken: set[int] = set()
        self._before: dict[signal.Signals, object] = {}

    def listen(self) -> None:
        """Handles SIGTERM, SIGUSR1 and SIGINT (Control-C) from here on."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._before[number] = signal.signal(number, self._take)

    def close(self) -> None:
        """Restores the signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    @property
    def reason(self) -> str | None:
        """The source of the request, in words."""
        if (
            self._reason is None
            and self._minutes is not None
            and time.time() - self._started >= 60 * self._minutes
        ):
            self._reason = f"limits.wall_clock_minutes ({self._minutes:g}) is over"
        if self._reason is None and self._file.exists():
            self._reason = (
                self._file.read_text(encoding="utf-8").strip() or f"{self._file} is there"
            )
        return self._reason

    def _take(self, number: int, frame: FrameType | None) -> None:
        # torchrun answers Control-C with a SIGTERM to its ranks, so only the same signal again
        # counts as a second one.
        if number in self._taken and number != signal.SIGUSR1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._taken.add(number)
        self._reason = f"{signal.Signals(number).name} was received"
        acknowledge(number)


def acknowledge(number: int) -> None:
    """Explains on stderr what a first signal does. Called by signal handlers, so it uses no
    buffered file."""
    name = signal.Signals(number).name
    again = "Control-C" if number == signal.SIGINT else "SIGTERM"
    os.write(
        2,
        (
            f"sftmix: {name}: the step is finished and the state saved;"
            f" {again} again ends at once\n"
        ).encode(),
    )


def exit_code_of(reason: str) -> int:
    """Returns the exit code of a run that has saved its state because of `reason`."""
    return INTERRUPTED if reason.startswith(signal.SIGINT.name) else STOPPED


@contextlib.contextmanager
def asking_to_stop(stop_file: Path) -> Iterator[None]:
    """Turns SIGTERM, SIGUSR1 and SIGINT (Control-C) into a file that rank 0 checks for after each
    step, because the launcher in between would kill the ranks. A second SIGTERM or SIGINT ends this
    process and the ranks."""

    def ask(number: int, frame: FrameType | None) -> None:
        if not stop_file.parent.is_dir():  # no rank has started so far
            raise SystemExit(128 + number)
        stop_file.write_text(f"{signal.Signals(number).name} was received\n", encoding="utf-8")
        acknowledge(number)
        if number != signal.SIGUSR1:
            signal.signal(number, _end_now)

    before = {
        number: signal.signal(number, ask)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
