"""Intervals cover what they say, and studies without a difference seldom show one."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from sftmix.evaluation.statistics import (
    error_of_ratio,
    holm,
    item_difference,
    paired_difference,
    sentence,
    sign_flip_p,
    switched,
)

STUDIES = 2000


def draws(rng, kind, shape):
    """Differences of seeds around 0: normal, or with Student's t of 3 degrees of freedom."""
    return rng.standard_normal(shape) if kind == "normal" else rng.standard_t(3, shape)


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("seeds", [5, 6, 10])
def test_an_interval_of_95_percent_covers_93_to_97(seeds, kind):
    rng = np.random.default_rng(seeds)
    covered = 0
    for study in draws(rng, kind, (STUDIES, seeds)):
        # the control varies between seeds far more than the difference does
        control = 10 * rng.standard_normal(seeds)
        found = paired_difference(control + 0.7 + study, control)
        covered += found.low <= 0.7 <= found.high
    assert 0.93 <= covered / STUDIES <= 0.97


def test_a_percentile_bootstrap_of_5_seeds_would_not():
    """Why the interval is not a bootstrap."""
    rng = np.random.default_rng(0)
    studies = rng.standard_normal((STUDIES, 5))
    means = studies[:, rng.integers(0, 5, (500, 5))].mean(-1)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.9


@pytest.mark.parametrize(
    ("kind", "seeds", "number"),
    [
        ("heavy", 5, 250),
        *(
            pytest.param(kind, seeds, 600, marks=pytest.mark.torture)
            for kind, seeds in (("normal", 10), ("heavy", 5))
        ),
    ],
)
def test_at_most_5_percent_of_studies_without_a_difference_show_one(kind, seeds, number):
    """Four arms against one control, so the comparisons depend on each other."""
    rng = np.random.default_rng(100 + seeds)
    false = false_without = 0
    for study in draws(rng, kind, (number, 5, seeds)):
        p_values = [paired_difference(arm, study[0]).p_value for arm in study[1:]]
        # an adjusted p is never smaller, and statsmodels takes 25 ms
        false += min(p_values) < 0.05 and min(holm(p_values)) < 0.05
        false_without += min(p_values) < 0.05
    # two binomial errors
    assert false / number <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / number)
    assert false_without / number > 0.06  # so the adjustment is needed


def test_the_t_interval_equals_that_of_scipy():
    rng = np.random.default_rng(1)
    arm, control = rng.standard_normal((2, 7))
    found = paired_difference(arm, control)
    expected = stats.ttest_rel(arm, control)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.mean == pytest.approx((arm - control).mean())


def test_the_sign_flip_test_equals_all_assignments_counted():
    differences = np.array([0.5, -0.1, 0.3, 0.2, 0.9, 0.4])
    all_means = [
        np.mean(np.array(signs) * differences) for signs in itertools.product((1, -1), repeat=6)
    ]
    share = np.mean(np.abs(all_means) >= abs(differences.mean()) - 1e-12)
    assert sign_flip_p(differences) == pytest.approx(share)
    # the smallest that 6 seeds allow, and why 5 have none
    assert sign_flip_p(np.ones(6) + np.arange(6)) == pytest.approx(2 / 2**6)
    assert paired_difference(np.arange(5.0), np.zeros(5)).p_sign_flip is None
    assert paired_difference(np.arange(6.0), np.zeros(6)).p_sign_flip is not None


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_one_seed_and_equal_differences():
    one = paired_difference([1.0], [2.0])
    assert one.mean == -1 and one.low is None and one.p_value is None
    assert "decides nothing" in sentence("a", "b", one, better=-1, unit="nats")
    none = paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert none.p_value == 1 and none.low == none.high == 0 and none.effect_size is None
    assert paired_difference([2.0, 3.0], [1.0, 2.0]).p_value == 0


@pytest.mark.parametrize(
    ("arm", "control", "word"),
    [([1.0, 2.0], [1.0], "one figure per seed"), ([float("nan"), 1.0], [0.0, 0.0], "not finite")],
)
def test_figures_that_do_not_fit_are_refused(arm, control, word):
    with pytest.raises(ValueError, match=word):
        paired_difference(arm, control)


def test_mcnemar_counts_the_examples_that_only_one_arm_answers():
    arm = np.array([True] * 10 + [False] * 2 + [True] * 5)
    control = np.array([False] * 10 + [True] * 2 + [True] * 5)
    found = switched(arm, control)
    assert (found.only_arm, found.only_control) == (10, 2)
    assert found.p_value == pytest.approx(stats.binomtest(2, 12, 0.5).pvalue)
    assert switched(arm, arm).p_value == 1


def test_the_error_of_a_loss_per_token_is_that_of_examples_drawn_again():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 60, 400).astype(float)
    losses = counts * (2 + 0.5 * rng.standard_normal(400))  # tokens of an example go together
    again = rng.integers(0, 400, (4000, 400))
    ratios = losses[again].sum(1) / counts[again].sum(1)
    assert error_of_ratio(losses, counts) == pytest.approx(ratios.std(), rel=0.05)


def test_the_sentence_says_which_is_better_and_only_where_it_is_shown():
    clear = paired_difference([1.0, 1.1, 0.9, 1.05, 1.0], [2.0, 2.2, 2.1, 2.0, 2.05])
    assert sentence("sftmix", "ntp", clear, better=-1, unit="nats").startswith(
        "sftmix is better than ntp"
    )
    assert "is worse" in sentence("sftmix", "ntp", clear, better=1, unit="points")
    noisy = paired_difference([1.0, 2.0, 0.0], [1.5, 1.0, 0.5])
    assert "no difference shown" in sentence("sftmix", "ntp", noisy, better=-1, unit="nats")


@pytest.mark.parametrize("only_one", [(0.02, 0.02), (0.1, 0.04), (0.3, 0.2)])
@pytest.mark.parametrize("count", [60, 300])
def test_the_interval_over_questions_covers_what_it_says(only_one, count):
    """Where only two answers in 60 differ it is wider than needed; with none it has a width."""
    rng = np.random.default_rng(count)
    first, second = only_one
    drawn = rng.choice([1, -1, 0], size=(4000, count), p=[first, second, 1 - first - second])
    found = [item_difference((each == 1) * 1.0, (each == -1) * 1.0) for each in drawn]
    covered = np.mean([each.low <= first - second <= each.high for each in found])
    assert 0.94 <= covered <= 0.998
    assert all(each.low < each.high for each in found)


def test_right_and_wrong_answers_are_compared_question_by_question():
    rng = np.random.default_rng(0)
    arm, control = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    found = item_difference(arm, control)
    assert found.mean == pytest.approx(arm.mean() - control.mean())
    assert found.switched == switched(arm == 1, control == 1)
    scores = item_difference(arm * 0.5, control * 0.25)
    expected = stats.ttest_rel(arm * 0.5, control * 0.25).confidence_interval(0.95)
    assert scores.switched is None
    assert (scores.low, scores.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="the same questions"):
        item_difference(arm, control[:-1])
