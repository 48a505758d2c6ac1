"""A traced step for other micro-batches and larger worlds.

Per micro-batch, what has tokens grows with them, what has response tokens with those, attention
with the sum of the squares of the documents' lengths; the rest stays. Over more ranks, shards
shrink: ZeRO-3 sends the same bytes whatever their number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sftmix.engine.counting import (
    ACTIVATIONS,
    PHASES,
    ROWS,
    SQUARES,
    TEMPORARIES,
    WORKSPACE,
    Collective,
    Counted,
    Product,
    workspace_rows,
)
from sftmix.planning.traces import Trace

SHARDED = ("master weights", "moments")  # from ZeRO stage 1 on
# ZeRO++ sends weights in 8 bits and gradients in 4 instead of 16 (arXiv 2306.10209, sections 3.1
# and 3.3); the scales of the blocks are not counted.
QUANTISED = {
    "zero_quantized_weights": ("allgather", 1 / 2),
    "zero_quantized_gradients": ("reduce_scatter", 1 / 4),
}
SUB_GROUP_BYTES = 4_000_000_000  # the part of the gradients that ZeRO-3 steps at once, in float32


class Load(NamedTuple):
    """A micro-batch. squares: sum of the squares of its documents' lengths."""

    tokens: float
    responses: float
    squares: float


@dataclass
class Work:
    """What a rank does in a phase. products: how often each is computed."""

    products: dict[Product, float] = field(default_factory=lambda: defaultdict(float))
    moved: float = 0.0
    operations: float = 0.0
    hooks: float = 0.0
    calls: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))
    sent: dict[Collective, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def flops(self) -> float:
        return sum(flops_of(product) * count for product, count in self.products.items())


def flops_of(product: Product) -> float:
    """Returns the FLOPs of one product; of attention, the half below the diagonal."""
    share = 0.5 if product.kind == "attention" else 1.0
    return 2.0 * share * product.m * product.n * product.k


@dataclass(frozen=True)
class Step:
    """A step of `num_ranks` ranks. stage: of ZeRO. zero: `zero_optimization` of the DeepSpeed
    JSON."""

    trace: Trace
    num_ranks: int
    stage: int
    zero: Mapping[str, object] = field(default_factory=dict)

    def work(self, load: Load, num_micro_batches: float) -> dict[str, Work]:
        """Returns what a rank does by phase, for so many micro-batches like `load`."""
        found = {phase: Work() for phase in PHASES}
        self._add(found, self.trace.one, load, 1.0)
        if num_micro_batches > 1:
            self._add(found, self.trace.two, load, num_micro_batches - 1)
            self._add(found, self.trace.one, load, -(num_micro_batches - 1))
        return found

    def _add(self, found: dict[str, Work], counted: Counted, load: Load, times: float) -> None:
        trace = self.trace
        length = trace.tokens // trace.documents
        response = trace.responses // trace.documents
        of_tokens, of_rows = load.tokens / trace.tokens, load.responses / trace.responses
        of_squares = load.squares / (trace.documents * length**2)

        def size(number: int) -> int:
            if number % length == 0:
                return max(1, round(number * of_tokens))
            return max(1, round(number * of_rows)) if number % response == 0 else number

        for product, count in counted.products.items():
            work = found[product.phase]
            has_squares = sum(number % length == 0 for number in product[2:5]) > 1
            if product.kind == "attention" or has_squares:
                work.products[product] += times * count * of_squares
            else:
                m, n, k = map(size, product[2:5])
                work.products[product._replace(m=m, n=n, k=k)] += times * count
        factors = {SQUARES: of_squares, ACTIVATIONS: of_tokens, ROWS: of_rows, TEMPORARIES: 1.0}
        for part, size_ in counted.moved.items():
            if part.phase in found:
                share = factors[part.grows]
                if part.phase == "optimiser":
                    share = self._shard
                found[part.phase].moved += times * share * size_
        for phase, work in found.items():
            work.operations += times * counted.operations[phase]
            work.hooks += times * counted.hooks[phase]
        for name in ("calls", "sent"):
            for kind, count in getattr(counted, name).items():
                # of a group smaller than the world, the size stays
                ranks = self.num_ranks if kind.size == trace.world_size else kind.size
                phase = kind.phase if kind.phase in found else "optimiser"
                share = self._sent_share(kind) if name == "sent" else 1.0
                getattr(found[phase], name)[Collective(phase, kind.operation, ranks)] += (
                    times * count * share
                )

    def _sent_share(self, kind: Collective) -> float:
        """Returns what ZeRO++ leaves of the bytes of a collective."""
        share = 1.0
        for key, (operation, left) in QUANTISED.items():
            is_quantised = kind.phase != "optimiser" and operation in kind.operation
            if self.zero.get(key) and is_quantised:
                share *= left
        return share

    @property
    def _shard(self) -> float:
        """A rank's share in this world over that in the traced one."""
        return self.trace.world_size / self.num_ranks if self.stage > 0 else 1.0

    def model_flops(self, load: Load, *, is_frozen: bool) -> float:
        """Returns the FLOPs that the method needs for this load, without recomputation: the forward
        three times, or twice where the weights are frozen, and the head's products."""
        work = self.work(load, 1)
        return (2 if is_frozen else 3) * work["forward"].flops + work["head"].flops

    @property
    def square_share(self) -> float:
        """The cost of attention, over n^2 and in tokens (`loss/flops.py`)."""
        trace = self.trace
        length = trace.tokens // trace.documents
        products = trace.one.products.items()
        forward = [(p, count) for p, count in products if p.phase == "forward"]
        attention = sum(flops_of(p) * n for p, n in forward if p.kind == "attention")
        rest = sum(flops_of(p) * n for p, n in forward if p.kind != "attention")
        per_token = rest / trace.tokens
        return attention / (trace.documents * length**2) / per_token if per_token else 0.0

    def memory(self, load: Load, num_micro_batches: float = 1) -> dict[str, dict[str, float]]:
        """Returns the most bytes alive at once, by phase and purpose."""
        counted = self.trace.two if num_micro_batches > 1 else self.trace.one
        return {
            phase: {
                purpose: self._size(phase, purpose, size, load)
                for purpose, size in peak.by_purpose.items()
            }
            for phase, peak in counted.peaks.items()
            if phase in PHASES
        }

    def _size(self, phase: str, purpose: str, size: float, load: Load) -> float:
        trace = self.trace
        if purpose == ACTIVATIONS:
            return size * load.tokens / trace.tokens
        if purpose == SQUARES:
            length = trace.tokens // trace.documents
            return size * load.squares / (trace.documents * length**2)
        if purpose == ROWS:
            return size * load.responses / trace.responses
        if purpose == WORKSPACE:
            return (
                size and self._workspace(load.responses) / self._workspace(trace.responses) * size
            )
        is_sharded = (
            purpose in SHARDED
            or (purpose == "gradients" and self.stage >= 2)
            or (purpose == "weights" and self.stage == 3)
        )
        if is_sharded:
            return size * self._shard
        if purpose == TEMPORARIES and phase == "optimiser" and self.stage == 3:
            whole = trace.num_trained_parameters * 4 / self.num_ranks
            return min(whole, SUB_GROUP_BYTES) if size > 2**20 else size
        return size

    def _workspace(self, responses: float) -> int:
        return workspace_rows(max(1, round(responses)), self.trace.vocab_size, 2)
