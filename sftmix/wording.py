"""Words for messages."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Returns a count with its noun, as in `1 example`, `1,200 examples`. plural: where it is not the singular with an s;
    it may hold the verb too."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
