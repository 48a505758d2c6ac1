"""Divides a step's examples among ranks and micro-batches.

The cut is a pure function of the plan, the lengths and the number of ranks, known to every rank.
Token counts of the whole step need no communication, and all ranks run the same number of
micro-batches, padded with empty ones, so that collectives never depend on data.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftmix.pairing.matching import StepUnits


@dataclass(frozen=True)
class StepCounts:
    """Token counts of a whole optimiser step, over all ranks: the divisors of its loss sums."""

    num_ntp_tokens: int
    num_mixup_tokens: int


Units = NDArray[np.int64]  # positions of units in a StepUnits


def count_step(plan: StepUnits, units: Units, num_response_tokens: NDArray[np.int64]) -> StepCounts:
    """Returns the counts of a step. A pair mixes min(N^c, N^u) positions, aligned from the first
    response token.

    Nothing predicts the first token of a sequence. No template begins with a response, so no
    response token is lost.
    """
    members = plan.units[units]
    is_pair = members[:, 1] >= 0
    first = num_response_tokens[members[:, 0]]
    second = num_response_tokens[members[:, 1]]
    return StepCounts(
        num_ntp_tokens=int(first.sum() + second[is_pair].sum()),
        num_mixup_tokens=int(np.minimum(first, second)[is_pair].sum()),
    )


def cut_step(
    plan: StepUnits,
    units: Units,
    num_tokens: NDArray[np.int64],
    *,
    micro_batch_tokens: int,
    num_ranks: int,
    packs: bool = False,
    square_share: float = 0.0,
) -> list[list[Units]]:
    """Returns the micro-batches of every rank: lists of units, the same number of lists for each
    rank. A pair is never divided.

    packs: the examples of a micro-batch follow one another, and it has at most
    `micro_batch_tokens`, unless a single unit has more. Units go to the rank with the least work.
    An example of n tokens costs n + square_share n^2. All ranks have the number of micro-batches
    that the fullest rank needs, of nearly equal size.

    Otherwise units of similar length share a micro-batch, whose padded size (examples times
    longest) stays within `micro_batch_tokens`, unless a single unit exceeds it. If there are fewer
    micro-batches than ranks, the largest are halved; then empty ones are added.
    """
    if packs:
        return _cut_packed(
            plan.units[units], units, num_tokens, micro_batch_tokens, num_ranks, square_share
        )
    members = plan.units[units]
    size = 1 + (members[:, 1] >= 0)
    longest = np.where(
        size == 2,
        np.maximum(num_tokens[members[:, 0]], num_tokens[members[:, 1]]),
        num_tokens[members[:, 0]],
    )

    pieces: list[list[int]] = []
    num_examples = 0
    for position in np.argsort(-longest, kind="stable"):
        num_examples += int(size[position])
        if not pieces or num_examples * int(longest[pieces[-1][0]]) > micro_batch_tokens:
            pieces.append([])
            num_examples = int(size[position])
        pieces[-1].append(int(position))

    def cost(piece: list[int]) -> int:
        return int(size[piece].sum()) * int(longest[piece[0]]) if piece else 0

    per_rank = -(-len(pieces) // num_ranks)
    while len(pieces) < per_rank * num_ranks:
        widest = max((p for p in pieces if len(p) > 1), key=cost, default=None)
        if widest is None:
            pieces.append([])
            continue
        half = len(widest) // 2
        pieces[pieces.index(widest) : pieces.index(widest) + 1] = [widest[:half], widest[half:]]

    # Longest first, each to the rank with the least work that still has room: the ranks wait for
    # the slowest.
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for piece in sorted(pieces, key=cost, reverse=True):
        rank = min(
            (r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (load[r], r)
        )
        ranks[rank].append(piece)
        load[rank] += cost(piece)
    return [[units[piece] if piece else units[:0] for piece in rank] for rank in ranks]


def _cut_packed(
    members: NDArray[np.int64],
    units: Units,
    num_tokens: NDArray[np.int64],
    micro_batch_tokens: int,
    num_ranks: int,
    square_share: float,
) -> list[list[Units]]:
    lengths = np.where(members >= 0, num_tokens[members], 0).astype(np.float64)  # (U, 2)
    tokens = lengths.sum(1)
    cost = tokens + square_share * (lengths**2).sum(1)
    ranks = spread(cost, np.arange(len(units)), num_ranks)
    # No fewer can hold them: a micro-batch has the budget, or one unit.
    budgeted = np.minimum(tokens, micro_batch_tokens)
    count = max(1, *(math.ceil(budgeted[rank].sum() / micro_batch_tokens) for rank in ranks))
    for rank in ranks:
        while count < len(rank) and any(
            len(piece) > 1 and tokens[piece].sum() > micro_batch_tokens
            for piece in spread(cost, rank, count)
        ):
            count += 1
    # The largest first on every rank: ranks wait for one another in each of them.
    return [
        [
            units[piece]
            for piece in sorted(spread(cost, rank, count), key=lambda p: -float(cost[p].sum()))
        ]
        for rank in ranks
    ]


def spread(
    cost: NDArray[np.float64], items: NDArray[np.int64], num_bins: int
) -> list[NDArray[np.int64]]:
    """Returns `items` in bins of nearly equal cost: the dearest first, each to the bin with the
    least so far (Graham 1969: no bin costs more than 4/3 of the best possible)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    load = [(0.0, number) for number in range(num_bins)]
    for item in items[np.argsort(-cost[items], kind="stable")]:
        total, number = heapq.heappop(load)
        bins[number].append(int(item))
        heapq.heappush(load, (total + float(cost[item]), number))
    return [np.array(each, dtype=np.int64) for each in bins]
