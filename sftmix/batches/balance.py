"""How evenly the work of a step is spread over the ranks.

Work is counted in tokens: an example of n tokens costs n + square_share n^2 (`cut.py`), and padded
tokens cost as much as others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sftmix.batches.cut import Units, cut_step
from sftmix.pairing.matching import Matching, StepUnits

SAMPLED_STEPS = 20


class Balance(NamedTuple):
    """Costs of a step, in tokens. real: of its examples, without padding. computed: of all ranks.
    slowest: of the rank with the most work."""

    real: float
    computed: float
    slowest: float

    def useful_share(self, num_ranks: int) -> float:
        """Returns which share of the ranks' time computes real tokens, if all wait for the slowest
        one; NaN without work."""
        return self.real / (num_ranks * self.slowest) if self.slowest else float("nan")

    def imbalance(self, num_ranks: int) -> float:
        """Returns the work of the slowest rank over that of the mean one; NaN without work."""
        return num_ranks * self.slowest / self.computed if self.computed else float("nan")

    def plus(self, other: Balance) -> Balance:
        """Returns the sums over both."""
        return Balance(*(a + b for a, b in zip(self, other, strict=True)))


def balance_of(
    plan: StepUnits,
    ranks: list[list[Units]],
    num_tokens: NDArray[np.int64],
    *,
    packs: bool,
    square_share: float,
) -> Balance:
    """Returns the costs of a step whose micro-batches `cut_step` gave to these ranks."""
    real, loads = 0.0, []
    for pieces in ranks:
        load = 0.0
        for piece in pieces:
            members = plan.units[piece]
            lengths = num_tokens[members[members >= 0]].astype(np.float64)
            cost = float((lengths + square_share * lengths**2).sum())
            real += cost
            longest = lengths.max(initial=0.0)
            load += cost if packs else len(lengths) * (longest + square_share * longest**2)
        loads.append(load)
    return Balance(real, sum(loads), max(loads))


def cut_and_weigh(
    plan: StepUnits,
    num_tokens: NDArray[np.int64],
    *,
    micro_batch_tokens: int,
    num_ranks: int,
    packs: bool,
    square_share: float,
) -> tuple[list[list[Units]], Balance]:
    """Returns the micro-batches of every rank for all units of a step, as `cut_step`, and their
    costs."""
    ranks = cut_step(
        plan,
        np.arange(len(plan.units)),
        num_tokens,
        micro_batch_tokens=micro_batch_tokens,
        num_ranks=num_ranks,
        packs=packs,
        square_share=square_share,
    )
    return ranks, balance_of(plan, ranks, num_tokens, packs=packs, square_share=square_share)


def expected_useful_share(
    matching: Matching,
    num_tokens: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_tokens: int,
    num_ranks: int,
    packs: bool,
    square_share: float,
    num_steps: int = SAMPLED_STEPS,
) -> float:
    """Returns the useful share of the first `num_steps` steps of an epoch; NaN without steps."""
    total = Balance(0.0, 0.0, 0.0)
    for number in range(min(num_steps, matching.num_steps(batch_size))):
        plan = matching.units(0, *matching.step(number, batch_size))
        _, balance = cut_and_weigh(
            plan,
            num_tokens,
            micro_batch_tokens=micro_batch_tokens,
            num_ranks=num_ranks,
            packs=packs,
            square_share=square_share,
        )
        total = total.plus(balance)
    return total.useful_share(num_ranks)
