"""Arms beside their control, from trials with known figures."""

import numpy as np
import pytest
from trials import trial

from sftmix.evaluation.statistics import paired_difference
from sftmix.studies.results import as_json, compare, sentences


def test_only_seeds_that_both_arms_have_are_compared():
    trials = {
        "ntp": {0: trial(2.0), 1: trial(2.2), 2: trial(9.0)},
        "sftmix": {1: trial(2.1), 0: trial(1.8), 7: trial(0.0)},
    }
    control, arm = compare(trials, "ntp", "loss")
    assert control.name == "ntp" and control.differences == {"loss": None, "exact_match": None}
    assert arm.differences["loss"].per_seed == pytest.approx([-0.1, -0.2])
    assert arm.mean("loss") == pytest.approx((2.1 + 1.8 + 0) / 3)


def test_p_values_are_adjusted_for_the_number_of_arms():
    rng = np.random.default_rng(0)
    seeds = range(6)
    trials = {
        name: {s: trial(2 + shift + rng.normal(0, 0.1), exact=[0]) for s in seeds}
        for name, shift in (("ntp", 0), ("a", 0.2), ("b", 0.15), ("c", 0))
    }
    arms = compare(trials, "ntp", "loss")[1:]
    raw = [arm.differences["loss"].p_value for arm in arms]
    smallest = int(np.argmin(raw))
    assert arms[smallest].differences["loss"].p_holm == pytest.approx(3 * raw[smallest])
    expected = paired_difference(
        [trials["a"][s].loss for s in seeds], [trials["ntp"][s].loss for s in seeds]
    )
    assert raw[0] == pytest.approx(expected.p_value)
    # of the other outcome nothing is said, so nothing is adjusted
    assert all(arm.differences["exact_match"].p_holm is None for arm in arms)
    assert len(sentences(arms, "ntp", "loss")) == 3


def test_examples_are_compared_one_by_one_only_where_they_are_the_same():
    same = compare(
        {"ntp": {0: trial(2.0, exact=[0, 1])}, "a": {0: trial(2, exact=[1, 2, 3], seed=1)}},
        "ntp",
        "loss",
    )[1]
    assert vars(same.switched[0]) | {"p_value": None} == {
        "only_arm": 2,
        "only_control": 1,
        "p_value": None,
    }
    assert same.differences["loss"].within > 0
    other = compare(
        {"ntp": {0: trial(2.0)}, "a": {0: trial(2.0, ids=["a", "b", "c", "e"])}}, "ntp", "loss"
    )[1]
    assert other.switched == {} and other.differences["loss"].within is None
    assert other.differences["loss"].mean == 0


def test_an_arm_without_results_and_a_control_without_any():
    arms = compare({"ntp": {}, "a": {0: trial(1.0)}, "b": {}}, "ntp", "loss")
    assert [arm.name for arm in arms] == ["a"] and arms[0].differences["loss"] is None
    assert as_json(arms, "loss")[0]["differences"] == {"loss": None, "exact_match": None}
