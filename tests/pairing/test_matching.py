from __future__ import annotations

import numpy as np
import pytest

from sftmix.pairing.matching import Matching, StepUnits, mix_coverage, pair_coverage

SIZES = [
    (0, 0, 0),
    (1, 1, 0),
    (5, 5, 1),
    (100, 100, 0),
    (100, 40, 7),
    (33, 101, 60),
    (0, 9, 4),
    (9, 0, 0),
    (0, 0, 12),
    (1000, 1003, 1),
    (105, 103, 0),
]
BLOCKS = [None, 1, 4, 10, 1000]


def draw(matching: Matching, epoch: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = matching.units(epoch, start, stop)
    return drawn.units, drawn.lam


def parts(c: int, u: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    places = np.random.default_rng(c + u + m).permutation(c + u + m)
    return places[:c], places[c : c + u], places[c + u :]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_example_is_in_one_unit_and_all_pairs_exist(
    sizes: tuple[int, int, int], block: int | None
) -> None:
    confident, unconfident, middle = parts(*sizes)
    matching = Matching(confident, unconfident, middle, seed=1, block_pairs=block)
    units, lam = draw(matching, 3, 0, matching.num_units)
    paired = units[:, 1] >= 0
    assert paired.sum() == matching.num_pairs == min(sizes[:2])
    assert np.array_equal(np.sort(units[units >= 0]), np.arange(sum(sizes)))
    assert (
        np.isin(units[paired, 0], confident).all() and np.isin(units[paired, 1], unconfident).all()
    )
    assert (lam[~paired] == 1).all() and ((lam >= 0) & (lam <= 1)).all()


@pytest.mark.parametrize("block", [None, 10])
def test_any_range_equals_the_whole(block: int | None) -> None:
    matching = Matching(*parts(300, 420, 55), seed=5, block_pairs=block)
    units, lam = draw(matching, 0, 0, matching.num_units)
    for start, stop in [
        (0, 1),
        (17, 18),
        (100, 333),
        (matching.num_units - 1, matching.num_units),
        (9, 9),
    ]:
        some, some_lam = draw(matching, 0, start, stop)
        assert np.array_equal(some, units[start:stop]) and np.array_equal(some_lam, lam[start:stop])


@pytest.mark.parametrize("block", [None, 10])
def test_seed_and_epoch_change_partners_order_lam_and_who_is_left_over(block: int | None) -> None:
    whole = {}
    for seed, epoch in [(1, 0), (1, 1), (2, 0)]:
        matching = Matching(*parts(1000, 1300, 0), seed=seed, block_pairs=block)
        units, lam = draw(matching, epoch, 0, matching.num_units)
        paired = units[:, 1] >= 0
        whole[seed, epoch] = (
            units[:, 0].tolist(),
            dict(units[paired].tolist()),
            sorted(lam.tolist()),
            set(units[~paired, 0].tolist()),
        )
    for one, two in [((1, 0), (1, 1)), ((1, 0), (2, 0))]:
        order, partners, lam, left = whole[one]
        other_order, other_partners, other_lam, other_left = whole[two]
        # the singles' places are the same, not their examples
        assert sum(a == b for a, b in zip(order, other_order, strict=True)) < 400
        assert sum(other_partners[c] == u for c, u in partners.items()) < (300 if block else 20)
        assert lam != other_lam
        assert len(left & other_left) < 150  # 300 of 1300: 69 by chance


def test_partners_are_uniform_over_epochs() -> None:
    matching = Matching(np.arange(8), np.arange(8, 20), np.arange(0), seed=0)
    met = np.zeros((8, 20))
    for epoch in range(6000):
        units, _ = draw(matching, epoch, 0, matching.num_units)
        pairs = units[units[:, 1] >= 0]
        met[pairs[:, 0], pairs[:, 1]] += 1
    expected = 6000 / 12
    # 96 cells with fixed row sums: mean near 88, deviation near 13
    statistic = ((met[:, 8:] - expected) ** 2 / expected).sum()
    assert statistic < 88 + 5 * 13.3


def test_partners_stay_in_their_block_and_every_pair_of_a_block_can_meet() -> None:
    confident, unconfident = np.arange(40), np.arange(100, 160)
    matching = Matching(confident, unconfident, np.arange(0), seed=0, block_pairs=10)
    met, left = set(), set()
    for epoch in range(400):
        units, _ = draw(matching, epoch, 0, matching.num_units)
        for c, u in units.tolist():
            if u >= 0:
                assert c // 10 == (u - 100) // 15
                met.add((c, u))
            else:
                left.add(c)
    assert len(met) == 4 * 10 * 15 and left == set(unconfident.tolist())


def test_blocks_by_length_mix_more_than_random_pairs() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(4, 1, 30_000).astype(np.int64) + 1
    by_length = np.argsort(lengths, kind="stable")
    confident, unconfident = (
        by_length[::2],
        np.delete(by_length[1::2], rng.choice(15_000, 2000, replace=False)),
    )
    coverage = {}
    for block in (None, 5000, 500, 50):
        matching = Matching(confident, unconfident, np.arange(0), seed=0, block_pairs=block)
        units, _ = draw(matching, 0, 0, matching.num_units)
        coverage[block] = mix_coverage(StepUnits(units[units[:, 1] >= 0], np.zeros(0)), lengths)
    assert coverage[None] < 0.6 < coverage[5000] < coverage[500] < coverage[50] <= 1, coverage
    assert coverage[50] > 0.95, coverage


def test_the_coverage_of_a_pair_is_twice_its_shorter_response() -> None:
    pairs, lengths = np.array([[0, 1], [2, 1]]), np.array([4, 6, 10])
    assert pair_coverage(pairs, lengths) == pytest.approx([8 / 10, 12 / 16])


def test_mix_coverage_counts_single_examples_as_unmixed() -> None:
    assert (
        mix_coverage(StepUnits(np.array([[0, 1], [2, -1]]), np.zeros(2)), np.array([4, 6, 10]))
        == 8 / 20
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 1000])
def test_steps_cover_the_epoch_with_batches_of_the_wanted_size(
    sizes: tuple[int, int, int], batch_size: int
) -> None:
    matching = Matching(*parts(*sizes), seed=0)
    bounds = [matching.step(number, batch_size) for number in range(matching.num_steps(batch_size))]
    assert [start for start, _ in bounds] == [0, *[stop for _, stop in bounds]][: len(bounds)]
    assert (bounds[-1][1] if bounds else 0) == matching.num_units
    held = []
    for start, stop in bounds:
        assert start < stop or batch_size == 1  # a pair fills two steps of one example
        units, _ = draw(matching, 0, start, stop)
        held.append(int((units >= 0).sum()))
    assert all(abs(size - batch_size) <= 1 for size in held[:-1]) and (
        not held or held[-1] <= batch_size + 1
    )


def test_refuses_units_outside_the_epoch() -> None:
    matching = Matching(*parts(5, 5, 0), seed=0)
    with pytest.raises(ValueError, match="5 units"):
        draw(matching, 0, 3, 6)
