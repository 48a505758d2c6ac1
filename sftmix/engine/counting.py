"""Counts what a training step keeps alive and sends: bytes by purpose, and collectives by group.

It watches every operation of torch, of real tensors as well as of fake ones
(`sftmix/engine/fake_world.py`). So the same code counts a run that is there and one that is not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix.engine.deepspeed_internals import purposes_of_tensors

GATHERED = "gathered weights"
OTHER = "activations and temporaries"


class Collective(NamedTuple):
    """A kind of collective call. phase: part of the step. size: ranks of its group."""

    phase: str
    operation: str
    size: int


@dataclass
class Peak:
    """The most bytes that were alive at once, and what for."""

    total: int = 0
    by_purpose: dict[str, int] = field(default_factory=dict)


class Counting(TorchDispatchMode):
    """While entered, every new storage counts as alive until it is freed, and every collective
    call counts with the bytes of its whole tensor (of a gather the output, of a reduction the
    input).

    peaks: by phase. calls, sent: calls and bytes by kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "build"
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = {}
        self.calls: Counter[Collective] = Counter()
        self.sent: Counter[Collective] = Counter()
        self._total = 0
        self._storages: dict[int, tuple[int, str]] = {}  # address -> bytes, purpose

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What happens within belongs to this phase."""
        before, self.phase = self.phase, phase
        self._note_peak()
        try:
            yield
        finally:
            self.phase = before
            self._note_peak()

    def start_again(self) -> None:
        """Forgets peaks and collectives; what is alive stays so."""
        self.peaks, self.calls, self.sent = {}, Counter(), Counter()

    def name_purposes(self, module: torch.nn.Module, optimizer: Any) -> None:
        """Gives the storages of weights, gradients and optimiser states their purpose."""
        for purpose, tensors in purposes_of_tensors(module, optimizer).items():
            for tensor in tensors:
                self._see(tensor)
                self._rename(tensor, purpose)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            self._count(function, args, kwargs)
        found = function(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def _count(self, function: Any, args: Any, kwargs: Any) -> None:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        groups = [leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject)]
        size = next(
            (
                torch.distributed.ProcessGroup.unbox(group).size()  # type: ignore[attr-defined]
                for group in groups
                if "ProcessGroup" in str(group._type())
            ),
            0,
        )
        operation = function._schema.name.removeprefix("c10d::").strip("_")
        kind = Collective(self.phase, operation, size)
        self.calls[kind] += 1
        self.sent[kind] += max((tensor.nbytes for tensor in tensors), default=0)
        if "gather" in operation and tensors:
            for tensor in tensors:
                if tensor.nbytes == max(each.nbytes for each in tensors):
                    self._see(tensor)
                    self._rename(tensor, GATHERED)
                    break

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (size, OTHER)
        self._add(OTHER, size)
        weakref.finalize(storage, self._forget, key)

    def _rename(self, tensor: Tensor, purpose: str) -> None:
        key = tensor.untyped_storage()._cdata
        size, before = self._storages[key]
        if before in (OTHER, GATHERED):  # the first purpose that is known stays
            self._storages[key] = (size, purpose)
            self.alive[before] -= size
            self.alive[purpose] += size
            self._note_peak()

    def _forget(self, key: int) -> None:
        size, purpose = self._storages.pop(key)
        self._add(purpose, -size)

    def _add(self, purpose: str, size: int) -> None:
        self.alive[purpose] += size
        self._total += size
        if size > 0:
            self._note_peak()

    def _note_peak(self) -> None:
        peak = self.peaks.setdefault(self.phase, Peak())
        if self._total >= peak.total:
            peak.total, peak.by_purpose = self._total, dict(self.alive)
