"""Splits by sorting, and matchings of parts in memory."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching


def split_by_confidence(
    example_ids: list[str],
    confidence: NDArray[np.float64],
    *,
    confident_share: float = 0.5,
    unconfident_share: float = 0.5,
) -> list[str]:
    """Returns the part ("confident", "middle", "unconfident") of every example, by
    sorting: an independent reference for `sftmix/pairing/split.py`.

    Sizes are rounded down, so halves are equal and an odd example out is in the middle. Of equal
    confidences the lower id is the more confident.
    """
    total = len(example_ids)
    num_unconfident, num_confident = (
        int(Fraction(share).limit_denominator(10**6) * total)
        for share in (unconfident_share, confident_share)
    )
    ranking = np.lexsort((np.array(example_ids), -confidence))  # most confident first
    parts = np.full(total, MIDDLE, dtype=object)
    parts[ranking[total - num_unconfident :]] = UNCONFIDENT
    parts[ranking[:num_confident]] = CONFIDENT
    return [str(part) for part in parts]


def match_parts(
    parts: NDArray[np.str_],
    num_response_tokens: NDArray[np.int64],
    *,
    seed: int,
    alpha: float,
    by_length: bool = False,
    block_pairs: int = 256,
) -> Matching:
    """Returns the matching of (N,) parts: random as in the paper, or `by_length` within blocks of
    about `block_pairs` pairs of like response length."""
    confident, unconfident, middle = (
        np.flatnonzero(parts == part) for part in (CONFIDENT, UNCONFIDENT, MIDDLE)
    )
    if by_length:
        confident, unconfident = (
            rows[np.argsort(num_response_tokens[rows], kind="stable")]
            for rows in (confident, unconfident)
        )
    return Matching(confident, unconfident, middle, seed, alpha, block_pairs if by_length else None)
