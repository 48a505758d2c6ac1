"""Response losses of every example under one model, sharded over the ranks.

The cut into micro-batches depends on the lengths alone, not on the number of ranks; each is scored by one
rank, and all ranks run the same number of forwards (empty ones where a rank has run out), since under
ZeRO-3 every forward gathers weights from all of them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.data.batches import TokenisedExamples, build_micro_batch
from sftmix.engine.engine import Engine
from sftmix.runlog import progress_bar


@dataclass(frozen=True)
class Scores:
    """One entry per example, in dataset order. nll_sum: nats over the response tokens, end-of-turn tokens included.
    is_exact: would greedy decoding have written exactly this response, ended where it ends."""

    nll_sum: NDArray[np.float64]
    num_response_tokens: NDArray[np.int64]
    is_exact: NDArray[np.bool_]


def score_examples(engine: Engine, examples: TokenisedExamples, *, micro_batch_tokens: int, pad_id: int, title: str) -> Scores:
    """Returns the scores of all examples, on every rank. All ranks call it."""
    units = cut_by_length(examples.num_tokens, micro_batch_tokens=micro_batch_tokens)
    ranks = engine.ranks
    rounds = -(-len(units) // ranks.world_size)
    rows = []
    bar = progress_bar() if ranks.is_main and sys.stdout.isatty() else None
    if bar is not None:
        bar.start()
        task = bar.add_task(title, total=rounds, info="")
    for turn in range(rounds):
        number = turn * ranks.world_size + ranks.rank
        indices = units[number] if number < len(units) else units[0][:0]
        batch = build_micro_batch([examples.tokens(i) for i in indices], [], indices=tuple(indices.tolist()), pad_id=pad_id)
        nll, match = engine.score(batch)
        sums = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, batch.owner, nll.double())
        misses = torch.zeros(len(indices), dtype=torch.float64).index_add_(0, batch.owner, (~match).double())
        rows.append(torch.stack([torch.from_numpy(indices).double(), sums, misses], dim=1))
        if bar is not None:
            bar.advance(task)
    if bar is not None:
        bar.stop()
    table = ranks.gather_rows(torch.cat(rows)).numpy()
    table = table[np.argsort(table[:, 0])]
    assert np.array_equal(table[:, 0], np.arange(len(examples))), "an example was scored twice or not at all"
    return Scores(table[:, 1], examples.num_response_tokens, table[:, 2] == 0)


def cut_by_length(num_tokens: NDArray[np.int64], *, micro_batch_tokens: int) -> list[NDArray[np.int64]]:
    """Returns index arrays, longest examples first, each within the padded token budget unless it holds one example."""
    pieces: list[list[int]] = []
    for index in np.argsort(-num_tokens, kind="stable"):
        if not pieces or (len(pieces[-1]) + 1) * int(num_tokens[pieces[-1][0]]) > micro_batch_tokens:
            pieces.append([])
        pieces[-1].append(int(index))
    return [np.array(piece, dtype=np.int64) for piece in pieces]
