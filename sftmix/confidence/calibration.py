"""Calibration of a model's next-token predictions: is a token of probability p right p of the time?

The tokens that greedy decoding would choose are sorted into bins of equal width by their
probability. The expected calibration error is the mean over the tokens of the distance between the
accuracy and the mean probability of their bin (Naeini et al., AAAI 2015; Guo et al., ICML 2017,
equation 3, with 15 bins).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_BINS = 15
NUM_COLUMNS = 3  # of a table of bins: tokens, sum of their probabilities, tokens that are right


def binned(top_nll: Tensor, match: Tensor) -> NDArray[np.float64]:
    """Returns the table of bins (NUM_BINS, NUM_COLUMNS) of T tokens. top_nll: (T,), the loss of the
    likeliest token, in nats. match: (T,) bool, whether it is the right one. Tables of several sets
    of tokens add up."""
    probability = torch.exp(-top_nll.double()).clamp(max=1.0)
    # bin n holds n / NUM_BINS < probability <= (n + 1) / NUM_BINS
    bins = (probability * NUM_BINS).ceil().long().sub(1).clamp(min=0)
    rows = torch.stack([torch.ones_like(probability), probability, match.double()], dim=1)
    table = torch.zeros(NUM_BINS, NUM_COLUMNS, dtype=torch.float64)
    return table.index_add_(0, bins, rows).numpy()


def reliability(table: NDArray[np.float64]) -> list[tuple[float, float, int]]:
    """Returns mean probability, accuracy and number of tokens of each bin that is not empty."""
    return [
        (float(probability / count), float(right / count), int(count))
        for count, probability, right in table
        if count
    ]


def expected_calibration_error(table: NDArray[np.float64]) -> float:
    """Returns the error, from 0 to 1; NaN for no token."""
    count, probability, right = table.sum(axis=0)[0], table[:, 1], table[:, 2]
    return float(np.abs(right - probability).sum() / count) if count else float("nan")
