"""What ranks know about each other, and why they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftmix.cluster.liveness.lines import Connection
from sftmix.cluster.liveness.progress import Position


@dataclass(frozen=True)
class Member:
    """A rank as the others know it."""

    rank: int
    host: str
    pid: int
    start: int | None
    place: dict[str, str | None]

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    def is_on(self, place: dict[str, str | None]) -> bool:
        """Returns whether its pid is valid in that namespace (`processes.namespace`)."""
        return place["boot_id"] is not None and self.place == place


@dataclass
class Peer:
    """A rank at the other end of a connection."""

    member: Member
    line: Connection
    position: Position


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end, and with which code. silent: the rank that does not answer, if that is the
    cause."""

    cause: str
    code: int
    silent: Member | None = None


def member_of(given: Any) -> Member | None:
    """Returns the member that a message describes; None if it describes none."""
    try:
        return Member(
            int(given["rank"]),
            str(given["host"]),
            int(given["pid"]),
            given["start"],
            dict(given["place"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
