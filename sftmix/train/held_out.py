"""Held-out losses during a training, and what they decide: which model is kept, and when to stop.

All ranks share the forwards, and the number of forwards of a rank depends on the data set alone
(`sftmix/confidence/scoring.py`), so no rank waits for one that has nothing to do. Every rank has
the same losses, and decides the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftmix.confidence.scoring import Scores
from sftmix.config.schema import TrainConfig
from sftmix.train.plan import last_steps_of_epochs


@dataclass(frozen=True)
class HeldOutLoss:
    """loss: nats per response token. exact_match: share of the examples whose response greedy
    decoding would produce. is_best: the lowest loss so far."""

    loss: float
    exact_match: float
    is_best: bool


class HeldOutLosses:
    """The held-out losses of one training.

    steps: (epoch, first unit, end unit) of every step of the plan. score: returns the held-out
    scores of the model as it is; its argument is a title. Collective: all ranks must call
    `measure`, `progress` and `restore`.
    """

    def __init__(
        self,
        settings: TrainConfig,
        steps: Sequence[tuple[int, int, int]],
        score: Callable[[str], Scores],
    ):
        self.keeps_best, self.decides = settings.keep_best, settings.chooses
        self._patience, self._score = settings.patience, score
        self._steps = frozenset(steps_of(settings.evaluate_every, steps))
        self.best_step, self._best_loss, self._num_since_best = 0, math.inf, 0

    def is_due(self, step: int) -> bool:
        """Returns whether the loss is measured after this step."""
        return step in self._steps

    @property
    def is_over(self) -> bool:
        """Whether the losses have not improved for as long as `patience` allows."""
        return self._patience is not None and self._num_since_best >= self._patience

    def measure(self, step: int) -> HeldOutLoss:
        """Returns the loss after a step. A loss that is not finite is never the best, except that
        the first one is the best so far."""
        scores = self._score(f"held out, step {step}")
        loss = float(scores.nll_sum.sum() / scores.num_response_tokens.sum())
        is_best = self.best_step == 0 or loss < self._best_loss
        if is_best:
            self.best_step, self._num_since_best = step, 0
            self._best_loss = loss if math.isfinite(loss) else math.inf
        else:
            self._num_since_best += 1
        return HeldOutLoss(loss, float(scores.is_exact.mean()), is_best)

    def progress(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Returns the state to resume from: see `sftmix/train/resuming.py`."""
        numbers = {
            "best_step": self.best_step,
            "best_loss": self._best_loss,
            "num_since_best": self._num_since_best,
        }
        return {name: float(number) for name, number in numbers.items()}, {}

    def restore(
        self, step: int, numbers: list[dict[str, float]], arrays: dict[str, NDArray[np.float64]]
    ) -> None:
        """Continues from the numbers of a rank; all have the same."""
        self.best_step = int(numbers[0]["best_step"])
        self._best_loss = numbers[0]["best_loss"]
        self._num_since_best = int(numbers[0]["num_since_best"])


def steps_of(every: str | int | None, steps: Sequence[tuple[int, int, int]]) -> list[int]:
    """Returns after which of the steps 1..N the loss is measured, the last one among them.

    every: "epoch", a number of steps, or None for never. steps: as of a plan.
    """
    if every is None:
        return []
    if every == "epoch":
        return last_steps_of_epochs(steps)
    assert isinstance(every, int)
    return sorted({*range(every, len(steps) + 1, every), len(steps)})
