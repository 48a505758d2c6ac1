"""Counts what a training step keeps alive, computes and sends: bytes by purpose, products by size,
collectives by group.

It watches every operation of torch, of real tensors as well as of fake ones
(`sftmix/engine/fake_world.py`). So the same code counts a run that is there and one that is not.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sftmix.engine.deepspeed_internals import purposes_of_tensors
from sftmix.kernels.chunked_linear_mixup import balanced_chunks

GATHERED = "gathered weights"
# What grows with the tokens of a micro-batch, with the squares of its documents, with its response
# tokens, and with none of them.
ACTIVATIONS, SQUARES = "activations", "attention scores"
ROWS, TEMPORARIES = "rows of responses", "temporaries"
UNNAMED = (GATHERED, ACTIVATIONS, SQUARES, ROWS, TEMPORARIES)
WORKSPACE = "logits of a chunk"
PHASES = ("forward", "head", "backward", "optimiser")  # of a step


class Part(NamedTuple):
    """phase: of the step. grows: as the bytes do, one of ACTIVATIONS, SQUARES, ROWS and
    TEMPORARIES."""

    phase: str
    grows: str


class Collective(NamedTuple):
    """A kind of collective call. phase: part of the step. size: ranks of its group."""

    phase: str
    operation: str
    size: int


class Product(NamedTuple):
    """A kind of matrix product (M, K) @ (K, N), or of attention: queries x keys, heads, head size.
    itemsize: bytes of an element."""

    phase: str
    kind: str  # "product" or "attention"
    m: int
    n: int
    k: int
    itemsize: int


@dataclass
class Peak:
    """The most bytes that were alive at once, and what for."""

    total: float = 0
    by_purpose: dict[str, float] = field(default_factory=dict)


@dataclass
class Counted:
    """What was done, and what was alive. peaks: by phase. calls, sent: calls and bytes by kind of
    collective. products: how often each kind was computed. moved: bytes that all other operations
    read and write. operations: calls into torch; hooks: modules that ZeRO-3 looked at; by phase."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    calls: Counter[Collective] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)
    products: Counter[Product] = field(default_factory=Counter)
    moved: Counter[Part] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)
    hooks: Counter[str] = field(default_factory=Counter)

    COUNTERS = ("calls", "sent", "products", "moved", "operations", "hooks")

    def add(self, other: Counted, times: float = 1) -> None:
        """Adds what another did, so many times; of the peaks too, purpose by purpose."""
        for name in self.COUNTERS:
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value
        for phase, peak in other.peaks.items():
            mine = self.peaks.setdefault(phase, Peak())
            mine.total += times * peak.total
            for purpose, size in peak.by_purpose.items():
                mine.by_purpose[purpose] = mine.by_purpose.get(purpose, 0) + times * size

    def as_json(self) -> dict[str, Any]:
        """Returns what `from_json` reads."""
        found: dict[str, Any] = {
            name: [[key, value] for key, value in sorted(getattr(self, name).items())]
            for name in self.COUNTERS
        }
        found["peaks"] = {phase: [p.total, p.by_purpose] for phase, p in self.peaks.items()}
        return found

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Counted:
        """Returns what `as_json` wrote. Raises KeyError or TypeError for anything else."""
        made = {"calls": Collective, "sent": Collective, "products": Product, "moved": Part}
        counters = {
            name: Counter(
                {(made[name](*key) if name in made else key): v for key, v in content[name]}
            )
            for name in cls.COUNTERS
        }
        peaks = {phase: Peak(total, by) for phase, (total, by) in content["peaks"].items()}
        return cls(peaks, **counters)


class Counting(TorchDispatchMode):
    """While entered, every new storage counts as alive until it is freed, and every collective
    call counts with the bytes of its whole tensor (of a gather the output, of a reduction the
    input). num_tokens, num_responses: a number that divides the elements of every tensor with the
    tokens (the response tokens) of the micro-batch, and of no other. Raises RuntimeError for an
    operation that computes products of unknown size."""

    def __init__(self, num_tokens: int = 0, num_responses: int = 0) -> None:
        super().__init__()
        self._divisors = (
            (SQUARES, num_tokens**2),
            (ACTIVATIONS, num_tokens),
            (ROWS, num_responses),
        )
        self.phase = "build"
        self.alive: Counter[str] = Counter()
        self.counted = Counted()
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

    def start_again(self) -> Counted:
        """Returns what was counted so far and counts anew; what is alive stays so."""
        before, self.counted = self.counted, Counted()
        return before

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
        namespace = function.namespace
        if namespace == "prim":  # asks for a device or a layout
            return function(*args, **kwargs)
        if namespace == "c10d":
            self._count(function, args, kwargs)
        found = function(*args, **kwargs)
        if function.is_view:
            self.counted.operations[self.phase] += 1
            return found
        for leaf in [found] if isinstance(found, Tensor) else tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        if namespace != "c10d":
            self._work(function, args, kwargs, found)
        return found

    def _work(self, function: Any, args: Any, kwargs: Any, found: Any) -> None:
        """Counts what an operation computes or moves."""
        phase, counted = self.phase, self.counted
        counted.operations[phase] += 1
        if function._schema.name == CHUNKED_LOSS:
            self._count_loss(function, args, kwargs)
            return
        if function in OF_NO_COST:
            return
        products = _products_of(function, args, found)
        for kind, m, n, k, itemsize in products:
            counted.products[Product(phase, kind, m, n, k, itemsize)] += 1
        if not products:
            for tensor, times in _moved(function, args, kwargs, found):
                counted.moved[Part(phase, self._grows(tensor))] += times * tensor.nbytes

    def _grows(self, tensor: Tensor) -> str:
        count = tensor.numel()
        for name, divisor in self._divisors:
            if count and divisor and count % divisor == 0:
                return name
        return TEMPORARIES

    def _count_loss(self, function: Any, args: Any, kwargs: Any) -> None:
        """The fused loss is one operation for torch. Its chunks of logits are products of their
        own, and the epilogue goes over them three times."""
        names = [argument.name for argument in function._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden, weight = given["hidden"], given["weight"]
        itemsize, vocab_size = hidden.element_size(), weight.shape[0]
        for start, stop in balanced_chunks(hidden.shape[0], vocab_size, itemsize):
            rows, size = stop - start, hidden.shape[1]
            sizes = [(rows, vocab_size, size)]
            sizes += [(rows, size, vocab_size)] if given["want_hidden"] else []
            sizes += [(vocab_size, size, rows)] if given["want_weight"] else []
            for m, n, k in sizes:
                self.counted.products[Product(self.phase, "product", m, n, k, itemsize)] += 1
            self.counted.moved[Part(self.phase, ROWS)] += 3 * rows * vocab_size * itemsize
        kept = workspace_rows(hidden.shape[0], vocab_size, itemsize)
        self.note_workspace(kept * vocab_size * itemsize)

    def note_hook(self) -> None:
        """Counts a module that ZeRO-3 looks at."""
        self.counted.hooks[self.phase] += 1

    def note_workspace(self, num_bytes: int) -> None:
        """Counts memory that an operation uses and frees where torch does not show it."""
        self._add(WORKSPACE, num_bytes)
        self._add(WORKSPACE, -num_bytes)

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
        self.counted.calls[kind] += 1
        self.counted.sent[kind] += max((tensor.nbytes for tensor in tensors), default=0)
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
        purpose = self._grows(tensor)
        self._storages[key] = (size, purpose)
        self._add(purpose, size)
        weakref.finalize(storage, self._forget, key)

    def _rename(self, tensor: Tensor, purpose: str) -> None:
        key = tensor.untyped_storage()._cdata
        size, before = self._storages[key]
        if before in UNNAMED:  # the first purpose that is known stays
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
        peak = self.counted.peaks.setdefault(self.phase, Peak())
        if self._total >= peak.total:
            peak.total, peak.by_purpose = self._total, dict(self.alive)


CHUNKED_LOSS = "sftmix::chunked_linear_mixup"
aten = torch.ops.aten
OF_NO_COST = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten._unsafe_view.default,
    aten._local_scalar_dense.default,
}
# They read the rows that they return, not the whole of their first argument.
READS_ROWS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}
WRITES_ONLY = {"aten::copy_", "aten::zero_", "aten::fill_"}


@functools.cache
def _is_product(function: Any) -> bool:
    """Whether torch itself counts FLOPs of this operation."""
    return function._overloadpacket in flop_registry


def _moved(function: Any, args: Any, kwargs: Any, found: Any) -> list[tuple[Tensor, int]]:
    """Returns each tensor that an operation reads or writes, and how often."""
    name = function._schema.name
    out = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    if name in READS_ROWS:
        return [(tensor, 2) for tensor in out]
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not out:  # foreach and fused operations write what they are given
        return [(tensor, 2) for tensor in inputs]
    if name in WRITES_ONLY:  # the first argument is what they write
        inputs = inputs[1:]
    return [(tensor, 1) for tensor in inputs + out]


def _products_of(function: Any, args: Any, found: Any) -> list[tuple[str, int, int, int, int]]:
    """Returns kind and sizes of the products of an operation; nothing if it has none."""
    name = function._schema.name.removeprefix("aten::")
    if name in ("mm", "addmm", "addmm_"):
        a, b = args[-2:] if name == "mm" else args[1:3]
        return [("product", a.shape[0], b.shape[1], a.shape[1], a.element_size())]
    if name in ("bmm", "baddbmm"):
        a, b = args[-2:] if name == "bmm" else args[1:3]
        each = ("product", a.shape[1], b.shape[2], a.shape[2], a.element_size())
        return [each] * a.shape[0]
    if name.endswith("_grouped_mm"):
        a, b = args[:2]
        if a.ndim == b.ndim == 2:  # the gradient of the weights: each expert has its tokens
            return [("product", a.shape[0], b.shape[1], a.shape[1], a.element_size())]
        return [("product", a.shape[-2], b.shape[-1], a.shape[-1], a.element_size())]
    if "attention" in name:
        is_backward = name.endswith("_backward")
        query, key = args[1:3] if is_backward else args[:2]
        # The forward has two products; the backward five, one of them the scores again.
        count = 5 if is_backward else 2
        size = query.shape[0] * query.shape[1]
        k = size * query.shape[3]
        return [("attention", query.shape[2], key.shape[2], k, query.element_size())] * count
    if _is_product(function):
        raise RuntimeError(f"{function} computes products, and sftmix does not know their size")
    return []


def workspace_rows(num_rows: int, vocab_size: int, itemsize: int) -> int:
    """Returns of how many rows the fused loss keeps the logits at once."""
    chunks = balanced_chunks(num_rows, vocab_size, itemsize)
    return max((stop - start for start, stop in chunks), default=0)
