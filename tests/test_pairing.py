import numpy as np
import pytest

from sftmix.pairing import (
    CONFIDENT,
    MIDDLE,
    UNCONFIDENT,
    draw_lam,
    plan_epoch,
    plan_epoch_without_pairs,
    split_by_confidence,
    steps_of_epoch,
)


def ids(count):
    return [f"id{n:04d}" for n in range(count)]


def halves(count):
    confidence = -np.random.default_rng(0).random(count)
    return confidence, split_by_confidence(ids(count), confidence)


@pytest.mark.parametrize("count", [2, 3, 10, 11, 101])
def test_halves_are_equal_and_an_odd_one_is_left_in_the_middle(count):
    confidence, parts = halves(count)
    assert parts.count(CONFIDENT) == parts.count(UNCONFIDENT) == count // 2
    assert parts.count(MIDDLE) == count % 2
    by_part = {p: [c for c, q in zip(confidence, parts, strict=True) if q == p] for p in set(parts)}
    assert min(by_part[CONFIDENT]) > max(by_part[UNCONFIDENT])


@pytest.mark.parametrize(("confident", "unconfident"), [(1 / 3, 1 / 3), (0.1, 0.6), (0.0, 0.5), (1.0, 0.0)])
def test_any_shares(confident, unconfident):
    confidence, _ = halves(30)
    parts = split_by_confidence(ids(30), confidence, confident_share=confident, unconfident_share=unconfident)
    assert (parts.count(CONFIDENT), parts.count(UNCONFIDENT)) == (round(30 * confident), round(30 * unconfident))


def test_equal_confidences_are_split_by_id_whatever_their_order():
    names = ids(10)
    parts = dict(zip(names, split_by_confidence(names, np.zeros(10)), strict=True))
    shuffled = list(reversed(names))
    assert dict(zip(shuffled, split_by_confidence(shuffled, np.zeros(10)), strict=True)) == parts
    assert list(parts.values()).count(CONFIDENT) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_confidence_that_is_not_finite_is_never_ranked(bad):
    with pytest.raises(ValueError, match=r"not finite.*id0002"):
        split_by_confidence(ids(5), np.array([0.0, 1.0, bad, 2.0, 3.0]))


@pytest.mark.parametrize(("confident", "unconfident"), [(0.5, 0.5), (0.2, 0.7), (0.6, 0.1), (0.0, 0.4)])
@pytest.mark.parametrize("count", [2, 7, 40, 41])
def test_every_example_is_seen_exactly_once_in_every_epoch(count, confident, unconfident):
    confidence, _ = halves(count)
    parts = split_by_confidence(ids(count), confidence, confident_share=confident, unconfident_share=unconfident)
    for epoch in range(3):
        plan = plan_epoch(ids(count), parts, seed=0, epoch=epoch, alpha=0.5)
        seen = plan.units[plan.units >= 0]
        assert sorted(seen.tolist()) == list(range(count))
        is_pair = plan.units[:, 1] >= 0
        assert is_pair.sum() == min(parts.count(CONFIDENT), parts.count(UNCONFIDENT))
        assert all(parts[c] == CONFIDENT and parts[u] == UNCONFIDENT for c, u in plan.units[is_pair])
        assert (plan.lam[~is_pair] == 1).all() and ((plan.lam >= 0) & (plan.lam <= 1)).all()


def test_epochs_and_seeds_pair_differently_and_repeat_exactly():
    _, parts = halves(40)

    def pairs(**key):
        plan = plan_epoch(ids(40), parts, alpha=0.5, **key)
        return {tuple(unit) for unit in plan.units.tolist()}, plan.lam.tolist()

    assert pairs(seed=0, epoch=0) == pairs(seed=0, epoch=0)
    assert pairs(seed=0, epoch=0)[0] != pairs(seed=0, epoch=1)[0]
    assert pairs(seed=0, epoch=0)[0] != pairs(seed=1, epoch=0)[0]


def test_lam_is_a_function_of_seed_epoch_and_pair_alone():
    key = {"seed": 3, "epoch": 1, "alpha": 0.5}
    assert draw_lam("a", "b", **key) == draw_lam("a", "b", **key)
    assert len({draw_lam("a", "b", **key), draw_lam("b", "a", **key), draw_lam("a", "b", **{**key, "epoch": 2})}) == 3


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_lam_follows_the_beta_distribution(alpha):
    draws = np.array([draw_lam("a", str(n), seed=0, epoch=0, alpha=alpha) for n in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha); its mean is 1/2
    assert abs(draws.mean() - 0.5) < 5 * np.sqrt(variance / 4000)
    assert draws.var() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 1000])
def test_steps_cover_the_epoch_and_hold_the_batch_size(batch_size):
    _, parts = halves(41)
    plan = plan_epoch(ids(41), parts, seed=0, epoch=0, alpha=0.5)
    bounds = steps_of_epoch(plan, batch_size=batch_size)
    assert [u for start, stop in bounds for u in range(start, stop)] == list(range(len(plan.units)))
    sizes = [int((plan.units[start:stop] >= 0).sum()) for start, stop in bounds]
    assert sum(sizes) == 41
    assert all(batch_size <= size <= batch_size + 1 for size in sizes[:-1])


def test_an_even_batch_of_halves_holds_as_many_confident_as_unconfident_examples():
    _, parts = halves(64)
    plan = plan_epoch(ids(64), parts, seed=0, epoch=0, alpha=0.5)
    for start, stop in steps_of_epoch(plan, batch_size=16):
        members = [parts[i] for i in plan.units[start:stop].flatten()]
        assert members.count(CONFIDENT) == members.count(UNCONFIDENT) == 8


def test_plan_without_pairs_is_a_shuffle_of_all_examples():
    plan = plan_epoch_without_pairs(50, seed=0, epoch=0)
    assert sorted(plan.units[:, 0].tolist()) == list(range(50)) and (plan.units[:, 1] == -1).all()
    assert plan.units[:, 0].tolist() != list(range(50))
    assert plan.units.tolist() != plan_epoch_without_pairs(50, seed=0, epoch=1).units.tolist()
