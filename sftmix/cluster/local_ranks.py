"""Starts a command once per rank on this machine, connected over the loopback interface, and waits
for all."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sftmix.cluster.environment import free_port

GRACE_SECONDS = 5.0  # for the others to end by themselves after a rank has failed
OF_A_LAUNCHER = frozenset(
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE LOCAL_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT"
    " TORCHELASTIC_USE_AGENT_STORE".split()
)


@dataclass(frozen=True)
class RankEnd:
    """code: exit code; None if it was killed because another had failed or the time was over.
    output: both streams."""

    code: int | None
    output: str


def run_local_ranks(
    command: list[str],
    num_ranks: int,
    *,
    limit_seconds: float,
    environment: Mapping[str, str] | None = None,
    start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
) -> list[RankEnd]:
    """Returns how each rank ended, in rank order. No process is left running. environment: merged
    over that of this process. start: takes the arguments of `subprocess.Popen`, and its place."""
    shared = {
        **{name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        **(environment or {}),
    }
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        # a full pipe would block a rank
        outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_ranks)]
        try:
            for rank, output in enumerate(outputs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    start(
                        command,
                        env=own,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
            codes = wait_for_all(
                processes, grace_seconds=GRACE_SECONDS, limit_seconds=limit_seconds
            )
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for output in outputs:
            output.seek(0)
        texts = [output.read().decode(errors="replace") for output in outputs]
    return [RankEnd(code, text) for code, text in zip(codes, texts, strict=True)]


def wait_for_all(
    processes: Sequence[subprocess.Popen[bytes]],
    *,
    grace_seconds: float,
    limit_seconds: float = math.inf,
) -> list[int | None]:
    """Waits until all processes have ended, until `grace_seconds` after the first that failed, or
    until the time is over. Returns their exit codes; None for one that still runs."""
    deadline = time.monotonic() + limit_seconds
    while (
        None in (codes := [process.poll() for process in processes]) and time.monotonic() < deadline
    ):
        if any(codes):
            deadline = min(deadline, time.monotonic() + grace_seconds)
        time.sleep(0.05)
    return codes


def first_failure(ends: list[RankEnd]) -> str | None:
    """Returns which rank failed and the end of its output; None if all succeeded. A killed rank is
    only a consequence of another failure."""
    failed = [(rank, end) for rank, end in enumerate(ends) if end.code != 0]
    if not failed:
        return None
    rank, end = min(failed, key=lambda pair: pair[1].code is None)
    how = "did not end in time" if end.code is None else f"ended with {end.code}"
    return f"rank {rank} of {len(ends)} {how}:\n{end.output[-4000:]}"
