"""The processes of a run: rank, number of ranks, and the collectives that stages need."""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from sftmix.cluster.environment import machine_bytes
from sftmix.storage import provenance

# Numbers the counters of this process; equal on all ranks, because all ranks create them together.
_counters = itertools.count()
RENDEZVOUS_LIMIT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """rank, world_size: of all processes. local_rank: on this machine. device: of this process.
    storage: for each rank the lowest rank that sees the same run folder; empty if all see the
    folder of rank 0."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    storage: tuple[int, ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Name of this rank's GPU, or of the processor."""
        is_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_gpu else provenance.processor()

    @property
    def is_storage_shared(self) -> bool:
        """Whether all ranks see one run folder."""
        return not self.storage

    @property
    def storage_leader(self) -> int:
        """The rank that acts for all ranks that see the same run folder as this one."""
        return self.storage[self.rank] if self.storage else 0

    @property
    def leads_storage(self) -> bool:
        """Whether this rank is that one."""
        return self.rank == self.storage_leader

    @property
    def ranks_of_storage(self) -> list[int]:
        """The ranks that see the same run folder as this one."""
        leaders = self.storage or [0] * self.world_size
        return [rank for rank, leader in enumerate(leaders) if leader == self.storage_leader]

    def bytes_to_leaders(self, content: bytes, length: int) -> bytes:
        """Sends `length` bytes from rank 0 to every rank that leads a disk, padded with zeros.
        Collective among those ranks; each knows the length."""
        sent = _as_tensor(content if self.is_main else b"", length)
        torch.distributed.broadcast(sent, src=0, group=_leaders_group(self.storage))
        return sent.numpy().tobytes()

    def join_leaders(self) -> None:
        """Creates the group for `bytes_to_leaders`. Collective: all ranks must call it."""
        _leaders_group(self.storage)

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def same_as_main(self, value: bool) -> bool:
        """Returns rank 0's value on every rank. Collective: all ranks must call it."""
        return bool(self.from_main([int(value)])[0])

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise sum over all ranks. Collective: all ranks must call it, with the
        same shape."""
        values = values.to(self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
        return values

    def all_gather_into(self, whole: torch.Tensor, share: torch.Tensor) -> None:
        """Fills `whole` (world_size * n,) with the shares (n,) of all ranks. Collective: all ranks
        must call it."""
        torch.distributed.all_gather_into_tensor(whole, share)

    def reduce_scatter_into(self, share: torch.Tensor, whole: torch.Tensor) -> None:
        """Fills `share` (n,) with this rank's part of the sum of all ranks' `whole`. Collective:
        all ranks must call it."""
        torch.distributed.reduce_scatter_tensor(share, whole)

    def counter(self) -> Callable[[], int]:
        """Returns a function that counts 0, 1, 2, ... over all ranks together, each number once.
        `counter` is collective; the returned function is not."""
        if self.world_size == 1:
            return itertools.count().__next__
        store, key = (
            torch.distributed.distributed_c10d._get_default_store(),
            f"sftmix/counter/{next(_counters)}",
        )
        return lambda: int(store.add(key, 1)) - 1

    def from_main(self, values: list[int]) -> list[int]:
        """Returns rank 0's list on every rank. Collective: all ranks must call it. Does not
        synchronise with a GPU."""
        return list(json.loads(self.text_from_main(json.dumps(values))))

    def agree(self, values: list[int | bool]) -> list[bool]:
        """Returns for each value whether it is true on any rank. Collective: all ranks must call
        it. Does not synchronise with a GPU."""
        if self.world_size == 1:
            return [bool(value) for value in values]
        flags = torch.tensor([int(value) for value in values])
        torch.distributed.all_reduce(
            flags, op=torch.distributed.ReduceOp.MAX, group=_control_group()
        )
        return [bool(flag) for flag in flags.tolist()]

    def gather_texts(self, text: str) -> list[str]:
        """Returns every rank's text, on every rank, in rank order. Collective: all ranks must call
        it. Sends bytes, not pickles."""
        if self.world_size == 1:
            return [text]
        content = text.encode()
        parts = self._gather(_as_tensor(content, len(content)), _control_group())
        return [part.numpy().tobytes().decode() for part in parts]

    def first_text(self, text: str) -> str:
        """Returns the text of the lowest rank that has one, on every rank; empty if none has.
        Collective: all ranks must call it."""
        return next((found for found in self.gather_texts(text) if found), "")

    def text_from_main(self, text: str) -> str:
        """Returns rank 0's text on every rank. Collective: all ranks must call it."""
        if self.world_size == 1:
            return text
        content, group = text.encode() if self.is_main else b"", _control_group()
        length = torch.tensor([len(content)])
        torch.distributed.broadcast(length, src=0, group=group)
        sent = _as_tensor(content, int(length))
        if len(sent):
            torch.distributed.broadcast(sent, src=0, group=group)
        return sent.numpy().tobytes().decode()

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the rows (N_r, K) of all ranks, concatenated in rank order; N_r may differ.
        Collective: all ranks must call it."""
        if self.world_size == 1:
            return rows
        return torch.cat(self._gather(rows.to(self.device))).cpu()

    def _gather(self, rows: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        """Returns the rows (N_r, ...) of every rank, in rank order; N_r may differ. group: for the
        collectives; all ranks by default."""
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(self.world_size)]
        torch.distributed.all_gather(counts, count, group=group)
        padded = rows.new_zeros(max(1, *map(int, counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        torch.distributed.all_gather(gathered, padded, group=group)
        return [part[: int(n)] for part, n in zip(gathered, counts, strict=True)]


def _as_tensor(content: bytes, length: int) -> torch.Tensor:
    """Returns bytes as a tensor (length,) of uint8, padded with zeros."""
    return torch.from_numpy(np.frombuffer(bytearray(content.ljust(length, b"\0")), np.uint8))


@functools.cache
def _control_group() -> Any:
    """Returns a gloo group for small messages about the run, which do not wait for work on a
    GPU."""
    return torch.distributed.new_group(backend="gloo", timeout=RENDEZVOUS_LIMIT)


@functools.cache
def _leaders_group(storage: tuple[int, ...]) -> Any:
    """Returns a group of the ranks that lead a disk. Collective: all ranks must call it."""
    return torch.distributed.new_group(
        sorted(set(storage)), backend="gloo", timeout=RENDEZVOUS_LIMIT
    )


def should_shard(weight_bytes: int, ranks: Ranks) -> bool:
    """Returns whether a model is too large for a rank to hold it whole with room for activations.
    The limit is half of a GPU's memory; on a CPU, half of the machine's memory (or the
    container's) divided by its ranks."""
    if ranks.world_size == 1:
        return False
    if ranks.device.type == "cuda":
        return is_too_large(
            weight_bytes, torch.cuda.get_device_properties(ranks.device).total_memory
        )
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size))
    return is_too_large(weight_bytes, machine_bytes()[0] / local_ranks)


def is_too_large(weight_bytes: float, memory: float) -> bool:
    """Returns whether weights leave too little of a rank's memory (bytes) to activations."""
    return weight_bytes > memory / 2


def has_gpu() -> bool:
    """Returns whether there is a GPU that torch and NCCL can use."""
    return torch.cuda.is_available()
