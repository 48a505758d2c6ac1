"""Held-out figures of one model, from the scores of its examples."""

from __future__ import annotations

import math
from typing import Any

from sftmix.confidence.scoring import Scores

MODEL_NAMES = {"baseline": "NTP baseline", "train": "SFTMix"}  # stage -> name in tables


def summarise(scores: Scores, groups: list[str | None]) -> dict[str, Any]:
    """Returns loss (nats per response token), perplexity and exact match, overall and by group.

    Loss is the mean over all response tokens, not the mean of the examples' means. Exact match is
    the share of examples whose whole response greedy decoding would produce.
    """
    named = sorted({group for group in groups if group is not None})
    by_group = {
        name: _figures(scores, [i for i, group in enumerate(groups) if group == name])
        for name in named
    }
    return {**_figures(scores, list(range(len(groups)))), "groups": by_group}


def _figures(scores: Scores, members: list[int]) -> dict[str, Any]:
    loss = float(scores.nll_sum[members].sum() / scores.num_response_tokens[members].sum())
    return {
        "num_examples": len(members),
        "loss_nats_per_token": loss,
        "perplexity": math.exp(min(loss, 700)),  # exp(700) is near the largest float
        "exact_match": float(scores.is_exact[members].mean()),
    }
