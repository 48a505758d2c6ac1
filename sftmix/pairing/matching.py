"""The pairs of every epoch: pure functions of the parts, seed and epoch. NumPy only.

The paper splits at the median into equal halves, D^c (confident) and D^u (unconfident), and pairs
at random (https://arxiv.org/abs/2410.05248, section 3). Here one epoch of pairs is a matching:
every example is in one unit of the epoch. The P = min(n_c, n_u) pairs hold one confident and one
unconfident example each; the rest of the larger part and the middle are units of one example,
trained with next-token prediction only.

Any range of an epoch's units is computed from (seed, epoch) and the position in the epoch, without
holding the rest. A rank, a resumed run and a test get the same examples for the same step.

Random matching (the paper's) and matching by length are one scheme. The ranks of both parts are
divided proportionally into the same number of blocks, and partners are drawn within a block. With
one block, any two examples can meet. With many blocks, and both parts sorted by length, partners
have similar lengths and less of the longer one stays unmixed. Blocks are defined by rank, not by
length, so that nothing is left over at their edges; matching by rank minimises the sum of the
differences in length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.errors import counted
from sftmix.pairing.permutation import Index, permute, symmetric_beta

CONFIDENT, MIDDLE, UNCONFIDENT = "confident", "middle", "unconfident"


@dataclass(frozen=True)
class StepUnits:
    """The units of one optimiser step, or of any other range of an epoch, in order.

    units: (U, 2) int64, dataset indices; the confident and the unconfident example of a pair, or
    one example and -1. lam: (U,) float64; share of the confident example; 1 for a unit of one
    example.
    """

    units: NDArray[np.int64]
    lam: NDArray[np.float64]


def singles(num_examples: int, *, seed: int) -> Matching:
    """Returns a plan without pairs: every example is one unit, in a different order in each
    epoch."""
    none = np.zeros(0, dtype=np.int64)
    return Matching(none, none, np.arange(num_examples), seed)


@dataclass(frozen=True)
class Matching:
    """confident, unconfident, middle: dataset indices; arrays or memory maps, read only as far as
    needed. For matching by length the first two are sorted by length. block_pairs: approximate
    pairs per block; None for one block."""

    confident: Index
    unconfident: Index
    middle: Index
    seed: int
    alpha: float = 0.5
    block_pairs: int | None = None

    @property
    def num_pairs(self) -> int:
        return min(len(self.confident), len(self.unconfident))

    @property
    def num_examples(self) -> int:
        return len(self.confident) + len(self.unconfident) + len(self.middle)

    @property
    def num_units(self) -> int:
        return self.num_examples - self.num_pairs

    def units(self, epoch: int, start: int, stop: int) -> StepUnits:
        """Returns the units [start, stop) of an epoch; lam ~ Beta(alpha, alpha)."""
        if not 0 <= start <= stop <= self.num_units:
            raise ValueError(
                f"[{start}, {stop}) is not within the {counted(self.num_units, 'unit')} of an epoch"
            )
        # Pairs are spread evenly among the singles, so that the position of any step is known
        # without counting.
        place = np.arange(start, stop + 1, dtype=np.int64)
        pairs_before = place * self.num_pairs // max(1, self.num_units)
        is_pair = np.diff(pairs_before) > 0
        place, pairs_before = place[:-1], pairs_before[:-1]
        units = np.full((len(place), 2), -1, dtype=np.int64)
        lam = np.ones(len(place))
        pair = permute(pairs_before[is_pair], self.num_pairs, "pairs", self.seed, epoch)
        units[is_pair] = self._pairs(pair, epoch)
        lam[is_pair] = symmetric_beta(pair, self.alpha, "lam", self.seed, epoch)
        single = (place - pairs_before)[~is_pair]
        units[~is_pair, 0] = self._singles(
            permute(single, self.num_units - self.num_pairs, "singles", self.seed, epoch), epoch
        )
        return StepUnits(units, lam)

    def num_steps(self, batch_size: int) -> int:
        """Returns the number of optimiser steps of an epoch."""
        units = self.num_units
        return (units - 1) * self.num_examples // (units * batch_size) + 1 if units else 0

    def step(self, number: int, batch_size: int) -> tuple[int, int]:
        """Returns the units [start, stop) of a step of the epoch: `batch_size` examples, one more
        or less if a pair would be divided; none if a single pair fills more than one step."""
        start, stop = (
            -(-at * batch_size * self.num_units // self.num_examples) for at in (number, number + 1)
        )
        return start, min(stop, self.num_units)

    @property
    def _num_blocks(self) -> int:
        return 1 if self.block_pairs is None else max(1, self.num_pairs // self.block_pairs)

    @property
    def _num_left_over(self) -> int:
        return abs(len(self.confident) - len(self.unconfident))

    def _pairs(self, pair: Index, epoch: int) -> Index:
        block = _block_of(pair, self.num_pairs, self._num_blocks)
        partner = self._of_larger(block, pair - block * self.num_pairs // self._num_blocks, epoch)
        if len(self.confident) <= len(self.unconfident):
            return np.stack([self.confident[pair], self.unconfident[partner]], axis=1)
        return np.stack([self.confident[partner], self.unconfident[pair]], axis=1)

    def _singles(self, single: Index, epoch: int) -> Index:
        examples = np.empty(len(single), dtype=np.int64)
        is_middle = single >= self._num_left_over
        examples[is_middle] = self.middle[single[is_middle] - self._num_left_over]
        left = single[~is_middle]
        block = _block_of(left, self._num_left_over, self._num_blocks)
        pairs = (
            block + 1
        ) * self.num_pairs // self._num_blocks - block * self.num_pairs // self._num_blocks
        member = self._of_larger(
            block, pairs + left - block * self._num_left_over // self._num_blocks, epoch
        )
        examples[~is_middle] = (
            self.confident if len(self.confident) > len(self.unconfident) else self.unconfident
        )[member]
        return examples

    def _of_larger(self, block: Index, place: Index, epoch: int) -> Index:
        """Returns the ranks, in the larger part, of the examples that the epoch's draw puts at
        `place` in their block; the first ones have partners."""
        blocks = self._num_blocks
        start = block * self.num_pairs // blocks + block * self._num_left_over // blocks
        size = (
            (block + 1) * self.num_pairs // blocks
            + (block + 1) * self._num_left_over // blocks
            - start
        )
        rank = np.empty(len(place), dtype=np.int64)
        for n in np.unique(size):  # at most three sizes
            here = size == n
            rank[here] = start[here] + permute(
                place[here], int(n), "partners", self.seed, epoch, tweak=block[here]
            )
        return rank


def mix_coverage(drawn: StepUnits, num_response_tokens: NDArray[np.integer[Any]]) -> float:
    """Returns the share of the units' response tokens that take part in a mix: of each pair, twice
    the shorter response."""
    units = drawn.units
    is_pair = units[:, 1] >= 0
    mixed = 2 * num_response_tokens[units[is_pair]].min(axis=1).sum()
    return float(mixed / num_response_tokens[units[units >= 0]].sum())


def pair_coverage(
    pairs: NDArray[np.int64], num_response_tokens: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """Returns, for each row of two examples, (P, 2), the share of their response tokens that is
    mixed: twice the shorter response."""
    lengths = num_response_tokens[pairs]
    return 2 * lengths.min(axis=1) / lengths.sum(axis=1)  # type: ignore[no-any-return]


def _block_of(rank: Index, total: int, blocks: int) -> Index:
    """Returns the block that a rank is in, where block j begins at rank j * total // blocks."""
    return ((rank + 1) * blocks - 1) // max(1, total)
