"""Errors that a user can act on.

    SftmixError
      ConfigError      a key, a value, or two settings that contradict each other
      DataError        a file, a row, a chat template
      ArtifactError    what one stage left for the next is missing, damaged or belongs to something else

Each message says what was found (with file, line, key and value), what was expected, and what to do.
The command line prints the message alone and exits with code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Returns a question with the known word nearest to a misspelt one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"Did you mean `{near[0]}`?" if near else otherwise


class SftmixError(Exception):
    """Base of all errors that a user can act on."""


class ConfigError(SftmixError):
    """The configuration cannot be run as it is."""


class DataError(SftmixError):
    """The data cannot be read, or cannot be turned into training examples."""


class ArtifactError(SftmixError):
    """An output of an earlier stage cannot be used."""
