"""Split by confidence, and pairs: pure functions of scores, seed and epoch. NumPy only.

The paper splits at the median into equal halves, D^c (confident) and D^u (unconfident), and pairs at
random (https://arxiv.org/abs/2410.05248, section 3). Here one epoch of pairs is a matching: every example
is seen once, and what is left over when the parts are unequal trains with next-token prediction alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENT, MIDDLE, UNCONFIDENT = "confident", "middle", "unconfident"

# One stream of random numbers for each purpose, so that no draw depends on how many others were made.
_ORDER, _MATCHING, _LAM = 1, 2, 3


@dataclass(frozen=True)
class EpochPlan:
    """What is trained in one epoch, in order. Index arrays point into the training set.

    units: (U, 2) int64; the confident and the unconfident example of a pair, or one example and -1.
    lam: (U,) float64; share of the confident example; 1 for a unit of one example.
    """

    units: NDArray[np.int64]
    lam: NDArray[np.float64]


def split_by_confidence(
    example_ids: list[str], confidence: NDArray[np.float64], *, confident_share: float = 0.5, unconfident_share: float = 0.5
) -> list[str]:
    """Returns the part ("confident", "middle", "unconfident") of every example.

    Sizes are rounded down, so halves are equal and an odd example out is in the middle. Equal confidences
    are ordered by id. Raises ValueError for a confidence that is not finite: it must not be ranked in silence.
    """
    if not np.isfinite(confidence).all():
        bad = [example_ids[i] for i in np.flatnonzero(~np.isfinite(confidence))[:5]]
        raise ValueError(f"the confidence of {int((~np.isfinite(confidence)).sum())} examples is not finite, first: {bad}")
    total = len(example_ids)
    num_unconfident, num_confident = int(unconfident_share * total + 1e-9), int(confident_share * total + 1e-9)
    ranking = np.lexsort((np.array(example_ids), confidence))  # least confident first
    parts = np.full(total, MIDDLE, dtype=object)
    parts[ranking[:num_unconfident]] = UNCONFIDENT
    parts[ranking[total - num_confident :]] = CONFIDENT
    return [str(part) for part in parts]


def plan_epoch_without_pairs(num_examples: int, *, seed: int, epoch: int) -> EpochPlan:
    """Returns a plan in which every example is a unit of its own, shuffled."""
    order = _generator(_ORDER, seed, epoch).permutation(num_examples)
    units = np.stack([order, np.full(num_examples, -1)], axis=1).astype(np.int64)
    return EpochPlan(units, np.ones(num_examples))


def plan_epoch(example_ids: list[str], parts: list[str], *, seed: int, epoch: int, alpha: float) -> EpochPlan:
    """Returns a random matching of confident and unconfident examples, shuffled, each example exactly once.

    lam ~ Beta(alpha, alpha) is a function of (seed, epoch, ids of the pair), and not of the pair's place.
    """
    part = np.array(parts)
    rng = _generator(_MATCHING, seed, epoch)
    confident = rng.permutation(np.flatnonzero(part == CONFIDENT))
    unconfident = rng.permutation(np.flatnonzero(part == UNCONFIDENT))
    num_pairs = min(len(confident), len(unconfident))
    pairs = np.stack([confident[:num_pairs], unconfident[:num_pairs]], axis=1)
    alone = np.concatenate([np.flatnonzero(part == MIDDLE), confident[num_pairs:], unconfident[num_pairs:]])
    singles = np.stack([alone, np.full(len(alone), -1)], axis=1)
    lam = np.array([draw_lam(example_ids[c], example_ids[u], seed=seed, epoch=epoch, alpha=alpha) for c, u in pairs])
    units = np.concatenate([pairs, singles]).astype(np.int64)
    lam = np.concatenate([lam, np.ones(len(singles))])
    order = _generator(_ORDER, seed, epoch).permutation(len(units))
    return EpochPlan(units[order], lam[order])


def draw_lam(confident_id: str, unconfident_id: str, *, seed: int, epoch: int, alpha: float) -> float:
    """Returns lam ~ Beta(alpha, alpha), a pure function of its arguments."""
    key = hashlib.sha256(f"{_LAM}:{seed}:{epoch}:{confident_id}:{unconfident_id}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return float(rng.beta(alpha, alpha))


def steps_of_epoch(plan: EpochPlan, *, batch_size: int) -> list[tuple[int, int]]:
    """Returns the [start, stop) unit ranges of the epoch's optimiser steps.

    A step takes units until it holds `batch_size` examples; a pair is never cut, so a step may hold one
    example more. The last step holds what is left.
    """
    sizes = 1 + (plan.units[:, 1] >= 0)
    bounds, start, held = [], 0, 0
    for unit, size in enumerate(sizes):
        held += int(size)
        if held >= batch_size:
            bounds.append((start, unit + 1))
            start, held = unit + 1, 0
    if held:
        bounds.append((start, len(sizes)))
    return bounds


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
