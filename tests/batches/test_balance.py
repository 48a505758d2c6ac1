"""How evenly a step's work is spread: counted by hand, and over the first steps of an epoch."""

import math

import numpy as np
import pytest

from sftmix.batches.balance import Balance, balance_of, expected_useful_share
from sftmix.batches.cut import cut_step
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching, StepUnits

LENGTHS = np.array([4, 6, 3, 5])
PLAN = StepUnits(np.array([[0, 1], [2, -1], [3, -1]]), np.ones(3))
# rank 0: the pair; rank 1: the others in one micro-batch, and an empty one
RANKS = [
    [np.array([0]), np.array([], dtype=int)],
    [np.array([1, 2]), np.array([], dtype=int)],
]


def test_costs_of_packed_ranks_are_those_of_their_examples():
    found = balance_of(PLAN, RANKS, LENGTHS, packs=True, square_share=0.1)
    pair, others = 10 + 0.1 * (16 + 36), 8 + 0.1 * (9 + 25)
    assert found == pytest.approx(Balance(pair + others, pair + others, pair))
    assert found.useful_share(2) == pytest.approx((pair + others) / (2 * pair))
    assert found.imbalance(2) == pytest.approx(2 * pair / (pair + others))


def test_padding_costs_as_much_as_tokens():
    found = balance_of(PLAN, RANKS, LENGTHS, packs=False, square_share=0.0)
    assert found == Balance(real=18.0, computed=12.0 + 10.0, slowest=12.0)
    assert found.useful_share(2) == 18 / 24


def test_ranks_without_work_have_no_share():
    empty = balance_of(PLAN, [[np.array([], dtype=int)]], LENGTHS, packs=True, square_share=0.0)
    assert empty == Balance(0.0, 0.0, 0.0) and math.isnan(empty.useful_share(1))


def matching(count):
    parts = np.random.default_rng(0).permutation(count)
    half = count // 2
    by_part = {CONFIDENT: parts[:half], UNCONFIDENT: parts[half:], MIDDLE: parts[:0]}
    return Matching(*(by_part[p] for p in (CONFIDENT, UNCONFIDENT, MIDDLE)), seed=0, alpha=0.5)


def test_packing_and_larger_batches_raise_the_useful_share():
    lengths = np.random.default_rng(1).integers(20, 400, 4000)
    options = {"micro_batch_tokens": 8192, "num_ranks": 8, "square_share": 0.0}

    def share(batch_size, packs):
        return expected_useful_share(
            matching(4000), lengths, batch_size=batch_size, packs=packs, **options
        )

    assert share(32, False) < share(32, True) < share(64, True) < share(256, True) <= 1
    assert share(256, True) > 0.95
    # 16 pairs are too few for 32 ranks
    assert (
        expected_useful_share(
            matching(4000), lengths, batch_size=32, packs=True, **{**options, "num_ranks": 32}
        )
        < 0.5
    )


def test_the_expected_share_is_that_of_the_first_steps():
    lengths = np.random.default_rng(1).integers(20, 400, 100)
    pairs = matching(100)
    total = Balance(0.0, 0.0, 0.0)
    for number in range(pairs.num_steps(10)):
        start, stop = pairs.step(number, 10)
        plan = pairs.units(0, start, stop)
        cut = cut_step(
            plan,
            np.arange(stop - start),
            lengths,
            micro_batch_tokens=500,
            num_ranks=2,
            packs=True,
            square_share=0.01,
        )
        total = total.plus(balance_of(plan, cut, lengths, packs=True, square_share=0.01))
    found = expected_useful_share(
        pairs,
        lengths,
        batch_size=10,
        micro_batch_tokens=500,
        num_ranks=2,
        packs=True,
        square_share=0.01,
    )
    assert found == pytest.approx(total.useful_share(2))
