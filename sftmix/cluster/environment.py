"""The rank of this process, from the environment variables of its launcher; the machine's memory.

torchrun and DeepSpeed set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. OpenMPI's
mpirun and srun set other variables and no address; `translate` adds the usual ones. The rest of
sftmix reads RANK and its companions.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sftmix.cluster.hostfile import is_host_name
from sftmix.errors import ConfigError

DEFAULT_PORT = 29500  # of deepspeed and torchrun
# prefix of a variable that a launcher would otherwise garble
CARRIED = "SFTMIX_SET_"
Otherwise = TypeVar("Otherwise")


@dataclass(frozen=True)
class LaunchedRank:
    """launcher: name of the launcher. rank, world_size: among all processes. local_*: on this
    machine; None if the launcher does not set them."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int | None
    local_size: int | None

    @property
    def is_on_many_nodes(self) -> bool:
        return self.local_size is not None and self.local_size < self.world_size


def launched_rank(environment: Mapping[str, str] = os.environ) -> LaunchedRank | None:
    """Returns the place of this process among those that a launcher started; None without a
    launcher.

    RANK takes precedence over mpirun's variables, and those over srun's: mpirun starts its helpers
    by srun, and either may start torchrun. The batch script of a SLURM job is not a task of a step,
    even if SLURM_NTASKS is set.
    """
    if "RANK" in environment:
        local_size = _number(environment, "LOCAL_SIZE", None)
        return LaunchedRank(
            launcher="RANK",
            rank=_needed(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE", 1),
            local_rank=_number(environment, "LOCAL_RANK", None),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", local_size),
        )
    if "OMPI_COMM_WORLD_RANK" in environment:
        rank, size, local_rank, local_size = (
            _needed(environment, f"OMPI_COMM_WORLD_{name}")
            for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        )
        return LaunchedRank("mpirun", rank, size, local_rank, local_size) if size > 1 else None
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        size = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
        if size > 1:
            rank, local_rank = (
                _needed(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID")
            )
            return LaunchedRank("srun", rank, size, local_rank, _tasks_here(environment))
    return None


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank; 0 without a launcher."""
    place = launched_rank(environment)
    return place.rank if place is not None else 0


def translate(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK and its companions from the variables of mpirun or srun, and LOCAL_WORLD_SIZE from
    DeepSpeed's LOCAL_SIZE. Does nothing without a launcher. Idempotent. Raises ConfigError if the
    ranks could not find each other.
    """
    for name in [name for name in environment if name.startswith(CARRIED)]:
        environment[name.removeprefix(CARRIED)] = environment.pop(name)
    place = launched_rank(environment)
    if place is None:
        return
    if place.local_size is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", str(place.local_size))
    if place.launcher == "RANK":
        _check_companions(environment)
        return
    address = environment.get("MASTER_ADDR") or _address(place, environment)
    port = environment.get("MASTER_PORT") or str(_port(place, environment))
    environment.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )


def _check_companions(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a RANK whose companions are missing or contradict it, for example left
    over from another job."""
    remedy = (
        "Unset RANK to run without a launcher (`env -u RANK sftmix ...`), or start the ranks with"
        " torchrun, deepspeed or `sftmix launch`, which set all of RANK, WORLD_SIZE, LOCAL_RANK,"
        " MASTER_ADDR and MASTER_PORT."
    )
    missing = [
        name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)
    ]
    if missing:
        raise ConfigError(
            f"RANK is set, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not."
            f" {remedy}"
        )
    rank, world_size, port = (
        _needed(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    )
    if rank >= world_size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are numbered from 0 to"
            f" WORLD_SIZE - 1. {remedy}"
        )
    if not 0 < port < 65536:
        raise ConfigError(
            f"MASTER_PORT is {port}, expected a port from 1 to 65535. Correct it, or unset RANK."
        )


def first_host(nodes: str) -> str:
    """Returns the first host of a SLURM node list: `gpu003` of `gpu[003-010,20],login1`. Raises
    ConfigError for anything else."""
    first = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)", nodes)
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not is_host_name(host):
        raise ConfigError(
            f"SLURM names the nodes {nodes[:80]!r}, expected a list such as gpu[003-010]. Set"
            " MASTER_ADDR to the first node."
        )
    return host


def _address(place: LaunchedRank, environment: Mapping[str, str]) -> str:
    if place.local_size == place.world_size:
        return "127.0.0.1"
    nodes = next(
        (
            environment[name]
            for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
            if environment.get(name)
        ),
        None,
    )
    if place.launcher == "srun" and nodes is not None:
        return first_host(nodes)
    example = (
        " (mpirun -x MASTER_ADDR=node-1, or a line of .deepspeed_env)"
        if place.launcher == "mpirun"
        else ""
    )
    raise ConfigError(
        f"rank {place.rank} of {place.world_size} was started by {place.launcher}, which does not"
        f" say where the ranks meet. Set MASTER_ADDR to the first node{example}."
    )


def _port(place: LaunchedRank, environment: Mapping[str, str]) -> int:
    """Returns a port that every rank can compute by itself. Jobs and steps that share a node get
    different ports."""
    if place.launcher != "srun":
        return DEFAULT_PORT
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    return 10000 + (job * 31 + step) % 20000  # below the kernel's ephemeral ports


def _tasks_here(environment: Mapping[str, str]) -> int | None:
    """Returns the tasks of this node, from `4(x2),3`: four on each of two nodes, three on the
    next."""
    text = (
        environment.get("SLURM_STEP_TASKS_PER_NODE")
        or environment.get("SLURM_TASKS_PER_NODE")
        or ""
    )
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None


def _needed(environment: Mapping[str, str], name: str) -> int:
    value = _number(environment, name, None)
    if value is None:
        raise ConfigError(
            f"{name} is not set, though other variables of the launcher are. Set it, or set RANK"
            " and WORLD_SIZE."
        )
    return value


def _number(environment: Mapping[str, str], name: str, otherwise: Otherwise) -> int | Otherwise:
    text = environment.get(name)
    if text is None:
        return otherwise
    if not re.fullmatch(r"\d{1,18}", text):
        raise ConfigError(f"{name} is {text[:40]!r}, expected a number. Correct it, or unset it.")
    return int(text)


def free_port() -> int:
    """Returns a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def machine_bytes() -> tuple[int, int]:
    """Returns (limit, available): of the machine, or of the container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")
        )
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            most = int((Path("/sys/fs/cgroup") / limit).read_text())
            if most < total:
                total, available = (
                    most,
                    min(available, most - int((Path("/sys/fs/cgroup") / used).read_text())),
                )
    return total, available
