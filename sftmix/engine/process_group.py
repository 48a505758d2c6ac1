"""Join the process group, choose the device and the CPU threads, and leave the group without an
abort."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistNetworkError, DistStoreError  # type: ignore[attr-defined]

from sftmix.cluster.environment import free_port, translate
from sftmix.engine.deepspeed_internals import build_no_extension, forget_groups, import_deepspeed
from sftmix.engine.ranks import RENDEZVOUS_LIMIT, Ranks, _control_group, _leaders_group, has_gpu
from sftmix.errors import ConfigError

# Rank 0 prepares the data before it joins the others.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def init_ranks(join_limit: timedelta = RENDEZVOUS_LIMIT) -> Ranks:
    """Joins the process group that the launcher (deepspeed, torchrun, mpirun, srun) describes, or
    one of a single process.

    NCCL on GPUs, gloo on CPUs. Calling it again returns the same group. Raises ConfigError if not
    all ranks join within `join_limit`, or the port is in use.
    """
    translate()
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(free_port()),
        )
    deepspeed = import_deepspeed()
    # before there is a group, because its functions keep the one that they find
    import torch.distributed.nn

    local_rank = _local_rank()
    device = torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")
    if has_gpu():
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        if not has_gpu():
            build_no_extension()
        backend = "nccl" if has_gpu() else "gloo"
        try:
            if (
                os.environ["MASTER_ADDR"] in LOOPBACK
                and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
            ):
                _join_over_loopback(backend, join_limit)
            else:
                torch.distributed.init_process_group(backend, timeout=join_limit)
        except (DistStoreError, DistNetworkError) as error:
            raise ConfigError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others"
                f" at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within"
                f" {join_limit.total_seconds():g} s ({str(error).splitlines()[0]}). Look at whether"
                " all ranks were started, with the same MASTER_ADDR and MASTER_PORT, and reach"
                " each other."
            ) from None
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=RENDEZVOUS_LIMIT
        )
        atexit.register(_leave)
    return Ranks(
        torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device
    )


def _leave() -> None:
    """Ends the process group while Python still runs. A gloo thread may hold the last reference to
    a tensor. If it releases it while the interpreter is finalised, the process aborts, and a
    finished run would end with SIGABRT (https://github.com/pytorch/pytorch/issues/190489)."""
    if getattr(sys, "last_value", None) is not None:
        # this rank ends by an error; its pending collectives may wait for ranks that never answer
        return
    if torch.distributed.is_initialized():
        for made in (_control_group, _leaders_group):
            made.cache_clear()  # a reference to a group keeps its threads alive
        forget_groups()
        torch.distributed.destroy_process_group()


def _local_rank() -> int:
    """Returns the index of this rank's GPU among the visible ones; on a CPU the local rank. Raises
    ConfigError if there is no GPU for it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not has_gpu() or local_rank < torch.cuda.device_count():
        return local_rank
    if torch.cuda.device_count() > 1:
        raise ConfigError(
            f"rank {os.environ['RANK']} is the {local_rank + 1}th of this machine, and"
            f" {torch.cuda.device_count()} GPUs are visible to it. Start one rank for each GPU."
        )
    # srun --gpus-per-task shows each task only its own GPU; DeepSpeed reads this variable
    os.environ["LOCAL_RANK"] = "0"
    return 0


def _join_over_loopback(backend: str, join_limit: timedelta) -> None:
    """Joins ranks that are all on this machine, unreachable from other machines. torch's own store
    listens on every interface for any address, and anyone who reaches it can write to it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")
    where = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    options: dict[str, Any] = {"world_size": world_size, "timeout": join_limit}
    if rank == 0:
        try:
            listener = socket.create_server(where)
        except OSError as error:
            raise ConfigError(
                f"port {where[1]} of {where[0]} is not available ({error.strerror}). Set another"
                " MASTER_PORT, or start again."
            ) from None
        store = TCPStore(*where, is_master=True, master_listen_fd=listener.detach(), **options)
    else:
        store = TCPStore(*where, is_master=False, **options)
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=join_limit
    )


def use_threads(num_threads: int | None) -> int:
    """Sets the number of CPU threads of torch; None keeps it (OMP_NUM_THREADS, or all cores).
    Returns the number. Matrix products are divided by thread, so another number rounds
    differently."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def threads_of_rank(num_threads: int | None, num_local_ranks: int) -> int:
    """Returns the CPU threads of each of several ranks on this machine: `engine.num_threads`, or
    its share of the cores."""
    return num_threads or max(1, (os.cpu_count() or 1) // num_local_ranks)
