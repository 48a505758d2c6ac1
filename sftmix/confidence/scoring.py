"""Response losses of every example under one model; the ranks share the work in units.

A unit is a fixed range of examples; its examples are sorted by length and divided into
micro-batches. Neither depends on the number of ranks, so the scores do not either. If every rank
holds the whole model, a free rank takes the next unit. If ZeRO-3 shards the model, every forward
gathers weights from all ranks: they take units in rounds and run the same number of forwards, empty
ones if a rank has no more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.examples import TokenisedExamples
from sftmix.cluster.liveness.progress import progress_bar
from sftmix.confidence.calibration import NUM_BINS, NUM_COLUMNS, binned
from sftmix.confidence.units import UnitScores
from sftmix.engine.engine import Engine
from sftmix.engine.ranks import Ranks
from sftmix.storage import faults


@dataclass(frozen=True)
class Scores:
    """One entry per example, in dataset order. nll_sum: nats over the response tokens, end-of-turn
    tokens included. is_exact: whether greedy decoding would produce exactly this response,
    including its end. bins: the table of all response tokens (`calibration.py`)."""

    nll_sum: NDArray[np.float64]
    num_response_tokens: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    bins: NDArray[np.float64]


@dataclass(frozen=True)
class WorkPlan:
    """How a data set is divided into work. unit_examples: examples per unit; micro_batch_tokens:
    padded tokens of a forward."""

    num_tokens: NDArray[np.int64]
    unit_examples: int
    micro_batch_tokens: int

    @property
    def num_units(self) -> int:
        return -(-len(self.num_tokens) // self.unit_examples)

    def examples(self, unit: int) -> range:
        """Returns the dataset indices of a unit."""
        return range(
            unit * self.unit_examples, min((unit + 1) * self.unit_examples, len(self.num_tokens))
        )

    def micro_batches(self, unit: int, *, packs: bool) -> list[NDArray[np.int64]]:
        """Returns the dataset indices of each of a unit's micro-batches. packs: the budget counts
        tokens without padding."""
        chosen = np.array(self.examples(unit))
        pieces = cut_by_length(
            self.num_tokens[chosen], micro_batch_tokens=self.micro_batch_tokens, packs=packs
        )
        return [chosen[piece] for piece in pieces]


def score_examples(
    engine: Engine, examples: TokenisedExamples, plan: WorkPlan, *, pad_id: int, title: str
) -> Scores:
    """Returns the scores of all examples, on every rank. Collective: all ranks must call it."""
    rows = [torch.zeros(0, 3, dtype=torch.float64)]
    bins = [torch.zeros(0, 1 + NUM_BINS * NUM_COLUMNS, dtype=torch.float64)]

    def keep(unit: int, scores: UnitScores) -> None:
        assert scores.bins is not None  # they were just counted
        bins.append(torch.from_numpy(np.append(float(unit), scores.bins)[None]))
        indices = np.asarray(plan.examples(unit), dtype=np.float64)
        rows.append(
            torch.from_numpy(np.stack([indices, scores.nll_sum, scores.num_misses], axis=1))
        )

    score_units(
        engine, examples, plan, list(range(plan.num_units)), keep, pad_id=pad_id, title=title
    )
    table = engine.ranks.gather_rows(torch.cat(rows)).numpy()
    table = table[np.argsort(table[:, 0])]
    assert np.array_equal(table[:, 0], np.arange(len(examples))), (
        "an example was scored twice or not at all"
    )
    # added in the order of the units, whichever rank had them: the same to the last bit
    by_unit = engine.ranks.gather_rows(torch.cat(bins)).numpy()
    total = by_unit[np.argsort(by_unit[:, 0]), 1:].sum(axis=0).reshape(NUM_BINS, NUM_COLUMNS)
    return Scores(table[:, 1], examples.num_response_tokens, table[:, 2] == 0, total)


def score_units(
    engine: Engine,
    examples: TokenisedExamples,
    plan: WorkPlan,
    units: list[int],
    finished: Callable[[int, UnitScores], None],
    *,
    pad_id: int,
    title: str,
) -> None:
    """Scores every unit of `units` (the same list on all ranks) on one rank, which calls
    `finished(unit, scores)`. Collective: all ranks must call it."""
    shown = _Progress(engine.ranks, plan, units, title)
    turns = _in_turns(engine, plan, units) if engine.is_sharded else _as_free(engine.ranks, units)
    for unit, num_forwards in turns:
        pieces = plan.micro_batches(unit, packs=engine.packs) if unit is not None else []
        parts = [_score_piece(engine, examples, piece, pad_id) for piece in pieces]
        for _ in range(num_forwards - len(pieces)):
            _score_piece(engine, examples, np.zeros(0, dtype=np.int64), pad_id)
        if unit is None:
            continue
        order = np.argsort(np.concatenate(pieces))
        *columns, bins = zip(*parts, strict=True)
        nll_sum, num_misses = (np.concatenate(column)[order] for column in columns)
        finished(unit, UnitScores(nll_sum, num_misses.astype(np.int64), sum(bins)))
        shown.advance(unit)
    shown.stop()


def _score_piece(
    engine: Engine, examples: TokenisedExamples, piece: NDArray[np.int64], pad_id: int
) -> tuple[NDArray[np.float64], ...]:
    batch = build_micro_batch(
        [examples.tokens(i) for i in piece],
        [],
        indices=tuple(piece.tolist()),
        pad_id=pad_id,
        packs=engine.packs,
        images=examples.images(piece.tolist()),
    )
    faults.point("score.forward")
    scores = engine.score(batch)
    sums = (batch.sum_by_example(values).numpy() for values in (scores.nll, ~scores.match))
    return (*sums, binned(scores.top_nll, scores.match))


def _as_free(ranks: Ranks, units: list[int]) -> Iterator[tuple[int | None, int]]:
    """Yields units to this rank: each time the next one that no rank has taken."""
    take = ranks.counter()
    while (number := take()) < len(units):
        yield units[number], 0


def _in_turns(engine: Engine, plan: WorkPlan, units: list[int]) -> Iterator[tuple[int | None, int]]:
    """Yields this rank's unit in every round, or None, and the number of forwards that all ranks
    run in that round."""
    ranks = engine.ranks
    for start in range(0, len(units), ranks.world_size):
        turn = units[start : start + ranks.world_size]
        num_forwards = max(len(plan.micro_batches(unit, packs=engine.packs)) for unit in turn)
        yield (turn[ranks.rank] if ranks.rank < len(turn) else None), num_forwards


def cut_by_length(
    num_tokens: NDArray[np.int64], *, micro_batch_tokens: int, packs: bool
) -> list[NDArray[np.int64]]:
    """Returns index arrays, longest examples first, each within the token budget unless it has one
    example. packs: the budget counts tokens without padding."""
    pieces: list[list[int]] = []
    size = 0
    for index in np.argsort(-num_tokens, kind="stable"):
        length = int(num_tokens[index])
        longest = int(num_tokens[pieces[-1][0]]) if pieces else 0
        size = size + length if packs else (len(pieces[-1]) + 1 if pieces else 1) * longest
        if not pieces or size > micro_batch_tokens:
            pieces.append([])
            size = length
        pieces[-1].append(int(index))
    return [np.array(piece, dtype=np.int64) for piece in pieces]


class _Progress:
    """Examples/s, tokens/s and time left of all ranks, estimated by rank 0 from its own units."""

    def __init__(self, ranks: Ranks, plan: WorkPlan, units: list[int], title: str):
        self._plan, self._is_main, self._title = plan, ranks.is_main, title
        self._num_ranks = min(ranks.world_size, max(1, len(units)))
        self._total = sum(len(plan.examples(unit)) for unit in units)
        self._examples = self._tokens = 0
        self._start = self._last_line = time.perf_counter()
        self._bar = progress_bar() if ranks.is_main and sys.stdout.isatty() else None
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(title, total=self._total, info="")

    def advance(self, unit: int) -> None:
        if not self._is_main:
            return
        chosen = self._plan.examples(unit)
        self._examples += len(chosen)
        self._tokens += int(self._plan.num_tokens[chosen.start : chosen.stop].sum())
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        done = min(self._total, self._examples * self._num_ranks)
        tokens = self._tokens * done / self._examples  # of the examples counted as done
        rates = f"{done / seconds:,.0f} examples/s {tokens / seconds:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, info=rates)
        elif now - self._last_line > 30:
            self._last_line = now
            left = seconds * (self._total - done) / max(1, done)
            print(
                f"{self._title}: about {done:,} of {self._total:,} examples, {rates},"
                f" {left / 60:.1f} min left",
                flush=True,
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
