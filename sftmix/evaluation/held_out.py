"""Held-out figures of one model, from the scores of its examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sftmix.confidence.calibration import expected_calibration_error, reliability
from sftmix.confidence.scoring import Scores

MAX_EXPONENT = 700  # exp(700) is near the largest float
MODEL_NAMES = {"baseline": "NTP baseline", "train": "SFTMix"}  # stage -> name in tables


def title_of(name: str) -> str:
    """Returns the name of a model in tables. name: its stage, or its path."""
    return MODEL_NAMES.get(name, name)


def table_of(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles of a table of held-out figures and a row of text per model."""
    rows = [
        [
            title_of(name),
            f"{found['loss_nats_per_token']:.4f}",
            f"{found['perplexity']:.3f}",
            f"{found['exact_match']:.1%}",
            f"{found['calibration']['expected_error']:.1%}",
        ]
        for name, found in metrics.items()
    ]
    return ["model", "loss", "ppl", "exact", "calibration"], rows


def summarise(scores: Scores, groups: list[str | None]) -> dict[str, Any]:
    """Returns loss (nats per response token), perplexity and exact match, overall and by group; and
    overall the calibration of the response tokens and the confidence of the examples.

    Loss is the mean over all response tokens, not the mean of the examples' means. Exact match is
    the share of examples whose whole response greedy decoding would produce. Confidence is minus
    the perplexity of a response under this one model; "log" is that of minus its loss, in nats per
    token, which few examples of a very high perplexity do not decide.
    """
    named = sorted({group for group in groups if group is not None})
    by_group = {
        name: _figures(scores, [i for i, group in enumerate(groups) if group == name])
        for name in named
    }
    mean_nll = scores.nll_sum / scores.num_response_tokens
    # half of it, so that the squares of a standard deviation fit as well
    perplexity = np.exp(np.minimum(mean_nll, MAX_EXPONENT / 2))
    confidence = {"linear": -perplexity, "log": -mean_nll}
    return {
        **_figures(scores, list(range(len(groups)))),
        "groups": by_group,
        "calibration": {
            "expected_error": expected_calibration_error(scores.bins),
            "bins": reliability(scores.bins),
        },
        "confidence": {
            kind: {"mean": float(values.mean()), "standard_deviation": float(values.std())}
            for kind, values in confidence.items()
        },
    }


def _figures(scores: Scores, members: list[int]) -> dict[str, Any]:
    loss = float(scores.nll_sum[members].sum() / scores.num_response_tokens[members].sum())
    return {
        "num_examples": len(members),
        "loss_nats_per_token": loss,
        "perplexity": math.exp(min(loss, MAX_EXPONENT)),
        "exact_match": float(scores.is_exact[members].mean()),
    }
