"""The definition of confidence over arrays, and the columns of the score tables (`table.py` writes
and reads them).

    Conf(Y | X) = -(1/C) sum_c PPL_c(Y | X)          (https://arxiv.org/abs/2410.05248, section 3.1)
    PPL_c = exp(mean negative log-likelihood per response token)

Chosen (the paper leaves it open): the mean is per token, and the end-of-turn token is a response
token.

Axes: C checkpoints, N examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

PERPLEXITY_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        # optimiser step of the reference run, or index of the model in confidence.models
        ("checkpoint", pa.int64()),
        ("nll_sum", pa.float64()),  # nats
        ("num_response_tokens", pa.int64()),
        ("perplexity", pa.float64()),
    ]
)
CONFIDENCE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("confidence", pa.float64()),  # negative mean perplexity over the checkpoints
        # standard deviation (population) of the perplexity over the checkpoints
        ("variability", pa.float64()),
        ("minimum", pa.float64()),  # of the perplexity
        ("maximum", pa.float64()),
        ("rank", pa.int64()),  # 1 is the most confident; null if the confidence is not finite
    ]
)


@dataclass(frozen=True)
class Aggregate:
    """Statistics of every example over the checkpoints, (N,) float64 each, as in CONFIDENCE_SCHEMA.
    Infinite or NaN perplexities give an infinite or NaN confidence, not an error."""

    confidence: NDArray[np.float64]
    variability: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]


def perplexity(
    nll_sum: NDArray[np.float64], num_response_tokens: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Returns exp(nll_sum / num_response_tokens); infinite if it overflows float64, not an
    error."""
    with np.errstate(over="ignore"):
        return np.exp(nll_sum / num_response_tokens)


def aggregate(
    nll_sum: Mapping[int, NDArray[np.float64]], num_response_tokens: NDArray[np.int64]
) -> Aggregate:
    """Returns confidence, variability and extremes; `nll_sum` maps each checkpoint to (N,) sums in
    nats.

    Sums run over ascending checkpoints, example by example, so a merged table is bit-identical to
    one made at once.
    """
    steps = sorted(nll_sum)
    assert steps, "confidence is a mean over at least one checkpoint"
    total, squares = np.zeros(len(num_response_tokens)), np.zeros(len(num_response_tokens))
    minimum, maximum = np.full(len(total), np.inf), np.full(len(total), -np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in steps:
            values = perplexity(nll_sum[step], num_response_tokens)
            total += values
            np.minimum(minimum, values, out=minimum)
            np.maximum(maximum, values, out=maximum)
        mean = total / len(steps)
        # in two passes: the difference of two large sums would lose a small deviation
        for step in steps:
            squares += (perplexity(nll_sum[step], num_response_tokens) - mean) ** 2
        return Aggregate(-mean, np.sqrt(squares / len(steps)), minimum, maximum)


def confidence_ranks(example_ids: pa.ChunkedArray, confidence: NDArray[np.float64]) -> pa.Array:
    """Returns (N,) int64: 1 for the most confident, ties by ascending id, null if the confidence is
    not finite."""
    is_finite = np.isfinite(confidence)
    ranked = pa.table(
        {"confidence": confidence[is_finite], "example_id": example_ids.filter(pa.array(is_finite))}
    )
    order = pc.sort_indices(
        ranked, sort_keys=[("confidence", "descending"), ("example_id", "ascending")]
    )
    ranks = np.zeros(len(confidence), dtype=np.int64)
    ranks[np.flatnonzero(is_finite)[order.to_numpy()]] = np.arange(1, len(order) + 1)
    return pa.array(ranks, mask=~is_finite)


def agreement(
    a: NDArray[np.float64], b: NDArray[np.float64], parts_a: Sequence[str], parts_b: Sequence[str]
) -> dict[str, float]:
    """Returns how far two scorings of the same N examples agree, over those whose confidence is
    finite in both.

    spearman: rank correlation, ties at their average rank; NaN for fewer than two examples, or
    where all are tied. same_part: share of examples that both splits put into the same part; NaN
    for no example.
    """
    is_finite = np.isfinite(a) & np.isfinite(b)
    centred = [
        ranks - ranks.mean()
        for ranks in (_average_ranks(a[is_finite]), _average_ranks(b[is_finite]))
        if len(ranks)
    ]
    scale = float(np.sqrt(np.prod([ranks @ ranks for ranks in centred])))
    same = (np.asarray(parts_a) == np.asarray(parts_b))[is_finite]
    return {
        "spearman": float(centred[0] @ centred[1]) / scale if centred and scale else float("nan"),
        "same_part": float(same.mean()) if len(same) else float("nan"),
    }


def _average_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
