"""Seconds of a step on a machine: what is computed, what is sent, and how far they overlap.

In a phase the GPU computes its products and moves the bytes of all other operations; the host
calls them one after another; the longer of both counts. Collectives run beside them. fast: they
overlap fully; slow: not at all; expected: a share of the shorter one stays visible.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftmix.engine.counting import Collective, Product
from sftmix.planning.hardware import Hardware
from sftmix.planning.step import Work, flops_of

EXPOSED = 0.15  # share of the shorter of computing and sending that does not overlap: assumed
# Of what is computed: the first and the last decile of published runs over their prediction
# (benchmarks/planner_published.py).
FAST, SLOW = 0.8, 1.25


@dataclass(frozen=True)
class Seconds:
    """Of a step. computing, hosting, sending: by themselves."""

    fast: float
    expected: float
    slow: float
    computing: float
    hosting: float
    sending: float

    def plus(self, other: Seconds) -> Seconds:
        """Returns the sums of both."""
        mine, others = vars(self).values(), vars(other).values()
        return Seconds(*(a + b for a, b in zip(mine, others, strict=True)))


def seconds_of(work: dict[str, Work], hardware: Hardware) -> Seconds:
    """Returns the seconds of a step. work: by phase."""
    total = Seconds(0, 0, 0, 0, 0, 0)
    for phase, part in work.items():
        rate = hardware.updated if phase == "optimiser" else hardware.moved
        total = total.plus(_of_phase(part, hardware, rate))
    return total


def _of_phase(work: Work, hardware: Hardware, rate: float) -> Seconds:
    computing = sum(
        count * product_seconds(product, hardware) for product, count in work.products.items()
    )
    computing = (computing + work.moved / rate) / hardware.sustained
    hosting = work.operations * hardware.operation_seconds + work.hooks * hardware.hook_seconds
    sending = sum(
        collective_seconds(kind, count, work.sent[kind], hardware)
        for kind, count in work.calls.items()
    )
    if hardware.is_synchronous:  # a CPU: the host computes, and gloo works in between
        whole = computing + hosting + sending
        return Seconds(FAST * whole, whole, SLOW * whole, computing, hosting, sending)
    busy = max(computing, hosting)
    expected = max(busy, sending) + EXPOSED * min(busy, sending)
    return Seconds(
        fast=max(FAST * busy, sending),
        expected=expected,
        slow=SLOW * busy + sending,
        computing=computing,
        hosting=hosting,
        sending=sending,
    )


def product_seconds(product: Product, hardware: Hardware) -> float:
    """Returns the seconds of one product: arithmetic or memory, whichever takes longer."""
    if product.kind == "attention":
        return flops_of(product) / hardware.attention_flops
    m, n, k = product.m, product.n, product.k
    arithmetic = flops_of(product) / hardware.product_flops
    if hardware.is_synchronous:  # measured with the memory that they touch
        return arithmetic
    memory = product.itemsize * (m * k + k * n + m * n) / hardware.moved
    return max(arithmetic, memory) + hardware.product_seconds


def collective_seconds(
    kind: Collective, calls: float, num_bytes: float, hardware: Hardware
) -> float:
    """Returns the seconds of collective calls with so many bytes in all. A ring sends (W - 1) / W
    of them once for a gather or a reduction to shards, twice for a sum on all ranks. Within a node
    every GPU has a link; nodes share their network."""
    ranks = kind.size
    if ranks <= 1:
        return calls * hardware.call_seconds
    within, between = _shares(kind, hardware)
    nodes = -(-ranks // hardware.gpus_per_node)
    latency = hardware.call_seconds + (nodes - 1) * hardware.node_seconds
    sending = max(num_bytes * within / hardware.link, num_bytes * between / hardware.network)
    return sending + calls * latency


def _shares(kind: Collective, hardware: Hardware) -> tuple[float, float]:
    """Returns the bytes that a GPU sends within its node, and that a node sends, over those of the
    whole tensor."""
    nodes = max(1, -(-kind.size // hardware.gpus_per_node))
    inside = max(1, min(kind.size, hardware.gpus_per_node))
    passes = _passes(kind)
    return passes * (inside - 1) / inside, passes * (nodes - 1) / nodes


def _passes(kind: Collective) -> float:
    """How often a ring sends the whole tensor."""
    is_sum_everywhere = "reduce" in kind.operation and "scatter" not in kind.operation
    return 2.0 if is_sum_everywhere else 1.0


def sent_share(kind: Collective) -> float:
    """Returns the bytes that a rank sends over those of the whole tensor."""
    return _passes(kind) * (kind.size - 1) / kind.size if kind.size > 1 else 0.0


def network_bytes(work: dict[str, Work], hardware: Hardware) -> tuple[float, float]:
    """Returns the bytes that a step sends within a node, per GPU, and out of a node."""
    within = between = 0.0
    for phase in work.values():
        for kind, num_bytes in phase.sent.items():
            inside, outside = _shares(kind, hardware)
            within += num_bytes * inside
            between += num_bytes * outside
    return within, between
