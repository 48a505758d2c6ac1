"""The calibration of predicted tokens, against its definition token by token."""

import math

import numpy as np
import pytest
import torch

from sftmix.confidence.calibration import (
    NUM_BINS,
    binned,
    expected_calibration_error,
    reliability,
)
from sftmix.confidence.scoring import Scores
from sftmix.evaluation.held_out import summarise


def by_definition(probability, right):
    """The mean over the tokens of the distance between accuracy and mean probability of a bin."""
    error, bins = 0.0, []
    for n in range(NUM_BINS):
        inside = [i for i, p in enumerate(probability) if n / NUM_BINS < p <= (n + 1) / NUM_BINS]
        if inside:
            p = math.fsum(probability[i] for i in inside) / len(inside)
            accuracy = sum(right[i] for i in inside) / len(inside)
            error += len(inside) / len(probability) * abs(accuracy - p)
            bins.append((p, accuracy, len(inside)))
    return error, bins


def test_error_and_bins_are_those_of_the_definition():
    generator = torch.Generator().manual_seed(0)
    top_nll = torch.empty(5000).exponential_(generator=generator)
    match = torch.rand(5000, generator=generator) < torch.exp(-top_nll) ** 1.5
    probability = torch.exp(-top_nll.double()).tolist()
    error, bins = by_definition(probability, match.tolist())
    parts = [binned(top_nll[rows], match[rows]) for rows in (slice(0, 7), slice(7, 5000))]
    table = sum(parts)
    assert expected_calibration_error(table) == pytest.approx(error, rel=1e-12)
    assert error > 0.05  # too confident by construction
    assert np.allclose(reliability(table), bins, rtol=1e-12)


def test_what_is_certain_and_right_has_no_error_and_no_token_has_none():
    table = binned(torch.zeros(4), torch.ones(4, dtype=torch.bool))
    assert expected_calibration_error(table) == 0.0
    assert reliability(table) == [(1.0, 1.0, 4)]
    # rounding can give a loss just below 0
    assert np.array_equal(table, binned(torch.full((4,), -1e-7), torch.ones(4, dtype=torch.bool)))
    empty = binned(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert math.isnan(expected_calibration_error(empty)) and reliability(empty) == []


def test_confidence_of_examples_is_minus_their_perplexity_and_minus_their_loss():
    nll_sum, lengths = np.array([2.0, 9.0, 4000.0]), np.array([2, 3, 4])
    scores = Scores(nll_sum, lengths, np.array([True, False, False]), np.ones((NUM_BINS, 3)))
    found = summarise(scores, ["a", "b", "a"])["confidence"]
    mean_nll = [1.0, 3.0, 1000.0]
    assert found["log"]["mean"] == pytest.approx(-np.mean(mean_nll))
    assert found["log"]["standard_deviation"] == pytest.approx(np.std(mean_nll))
    # exp(1000) is more than a float holds
    assert all(map(math.isfinite, found["linear"].values())) and found["linear"]["mean"] < -1e100
    few = Scores(nll_sum[:2], lengths[:2], np.array([True, False]), np.ones((NUM_BINS, 3)))
    found = summarise(few, ["a", "b"])["confidence"]["linear"]
    assert found["mean"] == pytest.approx(-(math.e + math.e**3) / 2)
    assert found["standard_deviation"] == pytest.approx((math.e**3 - math.e) / 2)
