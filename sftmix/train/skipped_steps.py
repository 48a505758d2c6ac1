"""Optimiser steps whose gradients are not finite: record them, and end training if there are too
many in a row.

DeepSpeed skips such a step on all ranks, because the NaN of one rank reaches every gradient. At
most it logs a line, and the step's data are silently lost. Here each skipped step is recorded with
the ids of the examples that caused it.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import torch

from sftmix.batches.collate import MicroBatch
from sftmix.engine.ranks import Ranks
from sftmix.errors import TrainingError, counted
from sftmix.loss.requests import LossResult
from sftmix.storage.failures import accessing


class SkippedSteps:
    """Writes one JSON line per skipped step to `path`: step, and the ids of the micro-batches whose
    loss was not finite, or of the whole step where only gradients were not. limit: steps in a row
    before training ends."""

    def __init__(self, ranks: Ranks, path: Path, example_ids: pa.ChunkedArray, *, limit: int):
        self._ranks, self._path, self._ids, self._limit = ranks, path, example_ids, limit
        self._micro_batches: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self._in_a_row: list[int] = []

    def add(self, batch: MicroBatch, loss: LossResult) -> None:
        """Keeps a micro-batch of the step, without synchronising with the device."""
        self._micro_batches.append((batch.indices, loss.ntp + loss.mixup + loss.auxiliary))

    def end_step(self, step: int, *, is_skipped: bool) -> None:
        """Ends a step; `is_skipped` is the same on all ranks. Raises TrainingError after `limit`
        skipped ones in a row."""
        seen, self._micro_batches = self._micro_batches, []
        if not is_skipped:
            self._in_a_row = []
            return
        self._in_a_row.append(step)
        rows = [
            (index, float(not torch.isfinite(loss))) for indices, loss in seen for index in indices
        ]
        table = self._ranks.gather_rows(torch.tensor(rows, dtype=torch.float64).reshape(-1, 2))
        causes = table[table[:, 1] == 1] if (table[:, 1] == 1).any() else table
        ids = self._ids.take(pa.array(sorted(causes[:, 0].long().tolist()))).to_pylist()
        what = "loss" if (table[:, 1] == 1).any() else "gradient"
        if self._ranks.is_main:
            with accessing(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "not_finite": what, "example_ids": ids}) + "\n"
                )
            print(
                f"  step {step} skipped: the {what} is not finite; {counted(len(ids), 'example')},"
                f" first {ids[0]} ({self._path.name})",
                flush=True,
            )
        if len(self._in_a_row) >= self._limit:
            first = self._in_a_row[0]
            raise TrainingError(
                f"no gradient was finite from step {first} to {step}"
                f" ({counted(len(self._in_a_row), 'step')}, limits.skipped_steps). The examples are"
                f" listed in {self._path}. Lower the learning rate, or look at these examples and"
                " at the model's weights.",
                on_all_ranks=True,
            )
