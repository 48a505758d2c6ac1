"""Processes and devices: who am I, how many are we, and the few collectives that stages need."""

from __future__ import annotations

import atexit
import functools
import inspect
import itertools
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from sftmix.cluster.environment import rank_of, translate
from sftmix.errors import ConfigError, did_you_mean

# Numbers the counters of this process; the same on all ranks, since all ranks make them together.
_counters = itertools.count()

# Rank 0 prepares the data before it joins the others.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RENDEZVOUS_LIMIT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """rank, world_size: of all processes. local_rank: on this machine. device: where this process computes.
    storage: for each rank the lowest of those that see the same run folder; empty where all see rank 0's."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    storage: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_storage_shared(self) -> bool:
        """Do all ranks see one run folder?"""
        return not self.storage

    @property
    def storage_leader(self) -> int:
        """The rank that does what one process must do in the run folder that this rank sees."""
        return self.storage[self.rank] if self.storage else 0

    @property
    def leads_storage(self) -> bool:
        """Is this rank that one?"""
        return self.rank == self.storage_leader

    def bytes_to_leaders(self, content: bytes, length: int) -> bytes:
        """Returns `length` bytes of rank 0 on every rank that leads a disk; where rank 0 has fewer, zeros follow. All of those ranks call
        it, and each knows the length."""
        sent = torch.zeros(length, dtype=torch.uint8)
        if self.is_main and content:
            sent[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        torch.distributed.broadcast(sent, src=0, group=_leaders_group(self.storage))
        return sent.numpy().tobytes()

    def join_leaders(self) -> None:
        """Makes the group that `bytes_to_leaders` needs. All ranks call it."""
        _leaders_group(self.storage)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def same_as_main(self, value: bool) -> bool:
        """Returns rank 0's value on every rank. All ranks call it."""
        return bool(self.sum(torch.tensor(float(value and self.is_main))).item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise sum over all ranks. All ranks call it, with the same shape."""
        values = values.to(self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def counter(self) -> Callable[[], int]:
        """Returns a function that gives 0, 1, 2, ... over all ranks together, each number once. All ranks call `counter`;
        calling what it returns waits for nobody."""
        if self.world_size == 1:
            return itertools.count().__next__
        store, key = torch.distributed.distributed_c10d._get_default_store(), f"sftmix/counter/{next(_counters)}"
        return lambda: int(store.add(key, 1)) - 1

    def from_main(self, values: list[int]) -> list[int]:
        """Returns rank 0's list on every rank. All ranks call it."""
        if self.world_size == 1:
            return values
        length = int(self.sum(torch.tensor([len(values) if self.is_main else 0])).item())
        sent = torch.zeros(length, dtype=torch.int64)
        if self.is_main:
            sent = torch.tensor(values, dtype=torch.int64)
        return [int(v) for v in self.sum(sent).tolist()]

    def agree(self, values: list[int | bool]) -> list[bool]:
        """Returns for each value whether it is true on any rank. All ranks call it; nothing waits for a GPU."""
        if self.world_size == 1:
            return [bool(value) for value in values]
        flags = torch.tensor([int(value) for value in values])
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=_control_group())
        return [bool(flag) for flag in flags.tolist()]

    def gather_texts(self, text: str) -> list[str]:
        """Returns every rank's text, on every rank, in rank order. All ranks call it. Bytes, not pickles."""
        content = torch.tensor(list(text.encode()), dtype=torch.int64)
        rows = self.gather_rows(torch.stack([torch.full_like(content, self.rank), content], dim=1))
        return [bytes(rows[rows[:, 0] == rank, 1].tolist()).decode() for rank in range(self.world_size)]

    def first_text(self, text: str) -> str:
        """Returns the text of the lowest rank that has one, on every rank; empty where none has. All ranks call it."""
        return next((found for found in self.gather_texts(text) if found), "")

    def text_from_main(self, text: str) -> str:
        """Returns rank 0's text on every rank. All ranks call it."""
        return bytes(self.from_main(list(text.encode()))).decode()

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the rows (N_r, K) of all ranks, concatenated in rank order; N_r may differ. All ranks call it."""
        if self.world_size == 1:
            return rows
        rows = rows.to(self.device)
        count = torch.tensor([rows.shape[0]], device=self.device)
        counts = [torch.zeros_like(count) for _ in range(self.world_size)]
        torch.distributed.all_gather(counts, count)
        longest = max(int(c) for c in counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, padded)
        return torch.cat([part[: int(c)] for part, c in zip(gathered, counts, strict=True)]).cpu()


@functools.cache
def _control_group() -> Any:
    """Returns a group for small messages about the run itself: gloo, so that none waits for what a GPU still computes."""
    return torch.distributed.new_group(backend="gloo", timeout=RENDEZVOUS_LIMIT)


@functools.cache
def _leaders_group(storage: tuple[int, ...]) -> Any:
    """Returns a group of the ranks that lead a disk. Made by all ranks together."""
    return torch.distributed.new_group(sorted(set(storage)), backend="gloo", timeout=RENDEZVOUS_LIMIT)


def should_shard(weight_bytes: int, ranks: Ranks) -> bool:
    """Is a model too large for every rank to hold it whole, with room for activations? Half of a GPU's memory is the
    limit, or on a CPU half of the machine's over its ranks."""
    if ranks.world_size == 1:
        return False
    if ranks.device.type == "cuda":
        return weight_bytes > torch.cuda.get_device_properties(ranks.device).total_memory / 2
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    return weight_bytes * local_ranks > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def environment_rank() -> int:
    """Returns this process's rank as its launcher says, before anything is initialised; 0 without a launcher."""
    return rank_of()


def has_gpu() -> bool:
    """Is there a device that torch and NCCL can use?"""
    return torch.cuda.is_available()


def init_ranks(join_limit: timedelta = RENDEZVOUS_LIMIT) -> Ranks:
    """Joins the process group that the launcher (deepspeed, torchrun, mpirun, srun) describes, or one of a single process.

    NCCL on GPUs, gloo on CPUs. Calling it again returns the same group. Raises ConfigError where not all ranks have come within
    `join_limit`, or the port is taken.
    """
    translate()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    deepspeed = import_deepspeed()
    import torch.distributed.nn  # before there is a group: its functions keep the one that they find

    local_rank = _local_rank()
    device = torch.device("cuda", local_rank) if has_gpu() else torch.device("cpu")
    if has_gpu():
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        if not has_gpu():
            # DeepSpeed would build a C++ extension for shared-memory reductions at the first start. gloo does
            # the same without a compiler, without a lock file that a killed build leaves behind for every later
            # start to wait on, and without leftovers in /dev/shm.
            from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

            deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        backend = "nccl" if has_gpu() else "gloo"
        try:
            if os.environ["MASTER_ADDR"] in LOOPBACK and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
                _join_over_loopback(backend, join_limit)
            else:
                torch.distributed.init_process_group(backend, timeout=join_limit)
        except (torch.distributed.DistStoreError, torch.distributed.DistNetworkError) as error:  # type: ignore[attr-defined]
            raise ConfigError(
                f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} within {join_limit.total_seconds():g} s ({str(error).splitlines()[0]}). Look at whether all "
                "ranks were started, with the same MASTER_ADDR and MASTER_PORT, and reach each other."
            ) from None
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=RENDEZVOUS_LIMIT)
        atexit.register(_leave)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device)


def _leave() -> None:
    """Ends the process group while Python still runs. A thread of gloo may hold the last reference to a tensor, and one that lets
    go of it when the interpreter is being torn down aborts the process: a run that is done would end with SIGABRT
    (https://github.com/pytorch/pytorch/issues/190489)."""
    if getattr(sys, "last_value", None) is not None:
        return  # this rank ends by an error; what it has under way may wait for ranks that never answer
    if torch.distributed.is_initialized():
        from deepspeed.utils import groups

        # What holds a group keeps its threads.
        for made in (_control_group, _leaders_group):
            made.cache_clear()
        for name, value in list(vars(groups).items()):
            if isinstance(value, torch.distributed.ProcessGroup):
                setattr(groups, name, None)
        torch.distributed.destroy_process_group()


def _local_rank() -> int:
    """Returns which of the visible GPUs is this rank's; on a CPU what the launcher says. Raises ConfigError where there is none for it."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not has_gpu() or local_rank < torch.cuda.device_count():
        return local_rank
    if torch.cuda.device_count() > 1:
        raise ConfigError(
            f"rank {os.environ['RANK']} is the {local_rank + 1}th of this machine, and {torch.cuda.device_count()} GPUs are visible to it. "
            "Start one rank for each GPU."
        )
    os.environ["LOCAL_RANK"] = "0"  # srun --gpus-per-task shows each task its own GPU alone; DeepSpeed reads this name
    return 0


def _join_over_loopback(backend: str, join_limit: timedelta) -> None:
    """Joins ranks that are all on this machine, so that no other machine can reach them: torch's own store listens on every
    interface, whatever address it is given, and anyone who reaches it can write to it."""
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
                f"port {where[1]} of {where[0]} cannot be had ({error.strerror}). Set another MASTER_PORT, or start again."
            ) from None
        store = TCPStore(*where, is_master=True, master_listen_fd=listener.detach(), **options)
    else:
        store = TCPStore(*where, is_master=False, **options)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=join_limit)


def import_deepspeed():  # type: ignore[no-untyped-def]
    """Returns the deepspeed module, with its start-up messages reduced to warnings."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; once per call would drown all else.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed


def release_leftovers(module: torch.nn.Module) -> None:
    """Lets go of what DeepSpeed 0.19 keeps of a destroyed engine to the end of the process: the model, by two names that hold all else with
    it (ZeRO-3: this rank's share of the weights), and the group of ranks that `zero_hpz_partition_size` made, because of which it
    would refuse to make it for the next engine. All ranks call it."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    FWD_MODULE_STACK[:] = [entered for entered in FWD_MODULE_STACK if entered is not module]
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for wrapped in inspect.getclosurevars(cached).nonlocals.values() if cached else ():
        if hasattr(wrapped, "cache_clear"):
            wrapped.cache_clear()  # its keys are modules
    group = groups._get_zero_param_intra_parallel_group()
    if group is not None:
        torch.distributed.destroy_process_group(group)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def check_zero_section(section: dict[str, Any], where: str) -> None:
    """Raises ConfigError for a key or value that DeepSpeed's own schema of `zero_optimization` refuses."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, detail["loc"])])
        if detail["type"] == "extra_forbidden":
            remedy = did_you_mean(str(detail["loc"][-1]), DeepSpeedZeroConfig.model_fields, "Remove it.")
            raise ConfigError(f"{where}: `{name}` is no key of DeepSpeed. {remedy}") from None
        raise ConfigError(f"{where}: `{name}` is {detail['input']!r}: {detail['msg'].lower()}. Correct the value.") from None


def use_threads(num_threads: int | None) -> int:
    """Lets torch compute with so many CPU threads in this process; None leaves it as it is (OMP_NUM_THREADS, or all cores).
    Returns the number. Sums in matrix products are cut by thread, so that another number rounds otherwise."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def threads_of_rank(num_threads: int | None, num_local_ranks: int) -> int:
    """Returns the CPU threads of each of several ranks on this machine: `engine.num_threads`, or its share of the cores."""
    return num_threads or max(1, (os.cpu_count() or 1) // num_local_ranks)


def free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
