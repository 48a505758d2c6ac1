import numpy as np
import pytest
from matchings import match_parts

from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, singles
from sftmix.pairing.split import split_values


def ids(count):
    return [f"id{n:04d}" for n in range(count)]


def halves(count):
    confidence = -np.random.default_rng(0).random(count)
    return confidence, split_values(ids(count), confidence)


@pytest.mark.parametrize("count", [2, 3, 10, 11, 101])
def test_halves_are_equal_and_an_odd_one_is_left_in_the_middle(count):
    confidence, parts = halves(count)
    assert parts.count(CONFIDENT) == parts.count(UNCONFIDENT) == count // 2
    assert parts.count(MIDDLE) == count % 2
    by_part = {p: [c for c, q in zip(confidence, parts, strict=True) if q == p] for p in set(parts)}
    assert min(by_part[CONFIDENT]) > max(by_part[UNCONFIDENT])


@pytest.mark.parametrize(
    ("confident", "unconfident"), [(1 / 3, 1 / 3), (0.1, 0.6), (0.0, 0.5), (1.0, 0.0)]
)
def test_any_shares(confident, unconfident):
    confidence, _ = halves(30)
    parts = split_values(
        ids(30), confidence, confident_share=confident, unconfident_share=unconfident
    )
    assert (parts.count(CONFIDENT), parts.count(UNCONFIDENT)) == (
        round(30 * confident),
        round(30 * unconfident),
    )


def test_equal_confidences_are_split_by_id_whatever_their_order():
    names = ids(10)
    parts = dict(zip(names, split_values(names, np.zeros(10)), strict=True))
    shuffled = list(reversed(names))
    assert dict(zip(shuffled, split_values(shuffled, np.zeros(10)), strict=True)) == parts
    assert list(parts.values()).count(CONFIDENT) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_confidence_that_is_not_finite_is_never_ranked(bad):
    with pytest.raises(ValueError, match=r"not finite.*id0002"):
        split_values(ids(5), np.array([0.0, 1.0, bad, 2.0, 3.0]))


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(
    ("confident", "unconfident"), [(0.5, 0.5), (0.2, 0.7), (0.6, 0.1), (0.0, 0.4)]
)
@pytest.mark.parametrize("count", [2, 7, 40, 41])
def test_every_example_is_seen_exactly_once_in_every_epoch(
    count, confident, unconfident, by_length
):
    confidence, _ = halves(count)
    parts = np.array(
        split_values(
            ids(count), confidence, confident_share=confident, unconfident_share=unconfident
        )
    )
    lengths = np.random.default_rng(1).integers(1, 50, count)
    matching = match_parts(parts, lengths, seed=0, alpha=0.5, by_length=by_length, block_pairs=4)
    for epoch in range(3):
        drawn = matching.units(epoch, 0, matching.num_units)
        assert sorted(drawn.units[drawn.units >= 0].tolist()) == list(range(count))
        is_pair = drawn.units[:, 1] >= 0
        assert is_pair.sum() == min((parts == CONFIDENT).sum(), (parts == UNCONFIDENT).sum())
        assert all(
            parts[c] == CONFIDENT and parts[u] == UNCONFIDENT for c, u in drawn.units[is_pair]
        )


def test_an_even_batch_of_halves_holds_as_many_confident_as_unconfident_examples():
    parts = np.array(halves(64)[1])
    matching = match_parts(parts, np.ones(64, dtype=np.int64), seed=0, alpha=0.5)
    for number in range(matching.num_steps(16)):
        members = parts[matching.units(0, *matching.step(number, 16)).units.flatten()].tolist()
        assert members.count(CONFIDENT) == members.count(UNCONFIDENT) == 8


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_lam_follows_the_beta_distribution(alpha):
    parts = np.array([CONFIDENT, UNCONFIDENT] * 4000)
    draws = (
        match_parts(parts, np.ones(8000, dtype=np.int64), seed=0, alpha=alpha).units(0, 0, 4000).lam
    )
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha); its mean is 1/2
    assert abs(draws.mean() - 0.5) < 5 * np.sqrt(variance / 4000)
    assert draws.var() == pytest.approx(variance, rel=0.1)


def test_a_plan_without_pairs_is_a_shuffle_of_all_examples():
    plan = singles(50, seed=0)
    first, second = (plan.units(epoch, 0, 50).units for epoch in (0, 1))
    assert sorted(first[:, 0].tolist()) == list(range(50)) and (first[:, 1] == -1).all()
    assert first[:, 0].tolist() != list(range(50)) and first.tolist() != second.tolist()
