"""Confidence of every example, from its perplexity under the checkpoints of a reference run. Tables only.

    Conf(Y | X) = -(1/C) sum_c PPL_c(Y | X)          (https://arxiv.org/abs/2410.05248, section 3.1)
    PPL_c = exp(mean negative log-likelihood per response token)

Chosen (the paper leaves it open): the mean is per token, and the end-of-turn token is a response token.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.errors import ArtifactError

PERPLEXITY_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("checkpoint", pa.int64()),  # optimiser step of the reference run
        ("nll_sum", pa.float64()),  # nats
        ("num_response_tokens", pa.int64()),
        ("perplexity", pa.float64()),
    ]
)
CONFIDENCE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("confidence", pa.float64()),  # minus the mean perplexity
        ("variability", pa.float64()),  # standard deviation of the perplexity over the checkpoints
        ("min_perplexity", pa.float64()),
        ("max_perplexity", pa.float64()),
    ]
)


def perplexity(nll_sum: NDArray[np.float64], num_response_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns exp(nll_sum / num_response_tokens); infinite where it exceeds float64, never an error."""
    with np.errstate(over="ignore"):
        return np.exp(nll_sum / num_response_tokens)


def perplexity_table(example_ids: list[str], nll_sum: dict[int, NDArray[np.float64]], num_response_tokens: NDArray[np.int64]) -> pa.Table:
    """Returns one row per checkpoint and example; `nll_sum` maps the checkpoint's step to (N,) sums in nats."""
    parts = [
        pa.table(
            [
                pa.array(example_ids),
                pa.array(np.full(len(example_ids), step)),
                pa.array(sums),
                pa.array(num_response_tokens),
                pa.array(perplexity(sums, num_response_tokens)),
            ],
            schema=PERPLEXITY_SCHEMA,
        )
        for step, sums in sorted(nll_sum.items())
    ]
    return pa.concat_tables(parts)


def confidence_table(example_ids: list[str], perplexities: NDArray[np.float64]) -> pa.Table:
    """Returns the aggregate of (C, N) perplexities, one row per example, in the given order."""
    return pa.table(
        [
            pa.array(example_ids),
            pa.array(-perplexities.mean(axis=0)),
            pa.array(perplexities.std(axis=0)),
            pa.array(perplexities.min(axis=0)),
            pa.array(perplexities.max(axis=0)),
        ],
        schema=CONFIDENCE_SCHEMA,
    )


def read_confidence(path: Path, example_ids: list[str]) -> NDArray[np.float64]:
    """Returns (N,) confidences in the order of `example_ids`.

    Raises ArtifactError where the table lacks or adds an example.
    """
    table = pq.read_table(path, columns=["example_id", "confidence"])
    by_id = dict(zip(table["example_id"].to_pylist(), table["confidence"].to_pylist(), strict=True))
    missing = [i for i in example_ids if i not in by_id]
    surplus = sorted(set(by_id) - set(example_ids))
    if missing or surplus:
        raise ArtifactError(
            f"{path} does not fit the data: {len(missing)} examples have no score (first {missing[:3]}), {len(surplus)} scores have "
            f"no example (first {surplus[:3]}). Score this data again (`sftmix score CONFIG`)."
        )
    return np.array([by_id[i] for i in example_ids], dtype=np.float64)
