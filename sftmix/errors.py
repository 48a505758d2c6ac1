"""Errors that a user can act on, and phrases that messages share.

    SftmixError
      ConfigError      a key, a value, or two settings that contradict each other
      DataError        a file, a row, a chat template
      ArtifactError    an output of an earlier stage is missing, damaged or of another run
      TrainingError    a run that cannot continue: losses that are not finite
      MachineError     a full disk, a denied permission, no memory (`sftmix/storage/failures.py`)
      StoppedError     no failure: asked to stop, and the state is saved (exit code 75)

Each message says what was found (with file, line, key and value), what was expected, and what to
do. The command line prints the message alone and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# exit code of a run that was asked to stop and has saved its state: EX_TEMPFAIL, start again
STOPPED = 75
INTERRUPTED = 130  # the same after Control-C: 128 + SIGINT, as in a shell


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Returns a count with its noun, as in `1 example`, `1,200 examples`. plural: for irregular
    forms; may include a verb."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Returns a suggestion: the known word most similar to a misspelt one, or `otherwise`."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else otherwise


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's error, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
        type(error).__name__
    ]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said.rstrip(".:") + "."


class SftmixError(Exception):
    """Base of all errors that a user can act on. on_all_ranks: every rank raises the same, so rank
    0 alone prints it."""

    def __init__(self, message: str, *, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks


class ConfigError(SftmixError):
    """The configuration cannot be run as it is."""


class DataError(SftmixError):
    """The data cannot be read, or cannot be turned into training examples."""


class ArtifactError(SftmixError):
    """An output of an earlier stage cannot be used."""


class TrainingError(SftmixError):
    """Training cannot continue."""


class MachineError(SftmixError):
    """The machine is the cause: disk, memory or permissions."""


class StoppedError(SftmixError):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, exit_code: int = STOPPED):
        super().__init__(message, on_all_ranks=True)
        self.exit_code = exit_code


def gib(num_bytes: float) -> str:
    """Returns a readable size."""
    return (
        f"{num_bytes / 2**30:.1f} GiB"
        if num_bytes >= 2**30 / 10
        else f"{num_bytes / 2**20:.1f} MiB"
    )
