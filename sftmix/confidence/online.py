"""Online scores: token losses of the training forwards, collected per example and epoch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.batches.collate import MicroBatch
from sftmix.engine.ranks import Ranks
from sftmix.loss.requests import LossResult


class OnlineScores:
    """Scores of a training run without an additional pass.

    The losses stay on the device and are summed over the ranks once per epoch. An example is scored
    when the epoch reaches it, before the step that learns from it.
    """

    def __init__(self, ranks: Ranks, num_examples: int):
        self._ranks = ranks
        # nats; times seen
        self._sums = torch.zeros(2, num_examples, dtype=torch.float64, device=ranks.device)
        self.nll_sum: dict[int, NDArray[np.float64]] = {}  # last step of the epoch -> (N,) nats

    def add(self, batch: MicroBatch, loss: LossResult) -> None:
        """Adds one micro-batch, without synchronising with the device."""
        if batch.indices:
            indices = torch.tensor(batch.indices).to(self._sums.device, non_blocking=True)
            self._sums[0].index_add_(0, indices, batch.sum_by_example(loss.token_nll))
            self._sums[1].index_add_(
                0, indices, torch.ones(len(indices), dtype=torch.float64, device=self._sums.device)
            )

    def progress(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Returns the state to resume from: see `sftmix/train/resuming.py`. Collective: all
        ranks must call it."""
        sums = self._ranks.sum(self._sums.clone()).cpu().numpy()
        return {}, {
            "sums": sums,
            **{f"epoch_{step:06d}": values for step, values in self.nll_sum.items()},
        }

    def restore(
        self, step: int, numbers: list[dict[str, float]], arrays: dict[str, NDArray[np.float64]]
    ) -> None:
        """Restores what `progress` returned. One rank sees each example, so the sums do not depend
        on the number of ranks."""
        self.nll_sum = {
            int(name[6:]): values for name, values in arrays.items() if name.startswith("epoch_")
        }
        self._sums = torch.from_numpy(arrays["sums"] * self._ranks.is_main).to(self._ranks.device)

    def end_epoch(self, step: int) -> None:
        """Closes an epoch whose last step is `step`. Collective: all ranks must call it."""
        nll_sum, seen = self._ranks.sum(self._sums).cpu().numpy()
        assert (seen == 1).all(), (
            "an epoch that shows an example twice, or not at all, cannot score it"
        )
        self.nll_sum[step] = nll_sum.copy()
        self._sums.zero_()
