"""The nodes of a run: lines of `host slots=N` as DeepSpeed's launchers read them, restricted to
names that are safe for ssh and shells."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sftmix.errors import ConfigError

# DeepSpeed's own parser accepts anything, even an option of ssh
_HOST = re.compile(r"[A-Za-z0-9._:-]+")
MAX_SLOTS = 1024


def is_host_name(text: str) -> bool:
    """Returns whether ssh, pdsh and mpirun can only read this as a host."""
    return _HOST.fullmatch(text) is not None and not text.startswith("-")


@dataclass(frozen=True)
class Node:
    """slots: its number of ranks, one per GPU."""

    host: str
    slots: int


def read_hostfile(path: Path) -> list[Node]:
    """Returns the nodes of a hostfile, lines of `host slots=N`. Raises ConfigError with file and
    line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hostfile {path} cannot be read: {error}. Give a file with lines of `host slots=N`."
        ) from None
    nodes: dict[str, Node] = {}
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d{1,9})", text)
        if match is None:
            raise ConfigError(
                f"{path}:{number}: found {text[:80]!r}, expected `host slots=N`. Correct the line."
            )
        host, slots = match[1], int(match[2])
        if not is_host_name(host):
            raise ConfigError(
                f"{path}:{number}: {host[:80]!r} is not a host name: letters, digits and"
                " . _ : - only, no - in front. Correct it."
            )
        if not 1 <= slots <= MAX_SLOTS:
            raise ConfigError(
                f"{path}:{number}: slots={slots}, expected 1 to {MAX_SLOTS}, the GPUs of the node."
                " Correct it."
            )
        if host in nodes:
            raise ConfigError(f"{path}:{number}: {host} is listed twice. Remove one line.")
        nodes[host] = Node(host, slots)
    if not nodes:
        raise ConfigError(f"{path} names no node. Give a file with lines of `host slots=N`.")
    return list(nodes.values())
