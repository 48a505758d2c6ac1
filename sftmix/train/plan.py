"""The plan of a training: its steps, its learning rates, and the checkpoints of the reference
run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sftmix.config.schema import TrainConfig
from sftmix.pairing.matching import Matching

EVERY_EPOCH_FROM = 3  # epochs; with fewer, 3 evenly spaced checkpoints


@dataclass(frozen=True)
class TrainingPlan:
    """The units to train on, in order. A pure function of seed and scores, without state."""

    matching: Matching
    num_epochs: int
    batch_size: int

    def steps(self) -> list[tuple[int, int, int]]:
        """Returns (epoch, first unit, end unit) of every optimiser step."""
        bounds = [
            self.matching.step(number, self.batch_size)
            for number in range(self.matching.num_steps(self.batch_size))
        ]
        return [
            (epoch, start, stop)
            for epoch in range(self.num_epochs)
            for start, stop in bounds
            if start < stop
        ]


def learning_rate_at(step: int, *, num_steps: int, settings: TrainConfig) -> float:
    """Returns the learning rate of optimiser step 1..num_steps: linear warm-up to the peak, then
    the schedule towards 0."""
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    # below 1, so that the last step still learns
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)
    match settings.schedule:
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return settings.learning_rate * (1 - progress)
        case "constant":
            return settings.learning_rate


def choose_checkpoint_steps(plan: TrainingPlan, num_checkpoints: int | None) -> list[int]:
    """Returns the steps after which the reference run keeps a checkpoint, the last step among them.

    Chosen (the paper does not say where): the end of every epoch, or 3 evenly spaced steps with
    fewer than 3 epochs; `num_checkpoints` spaces that many evenly.
    """
    steps = plan.steps()
    if num_checkpoints is None and plan.num_epochs >= EVERY_EPOCH_FROM:
        return last_steps_of_epochs(steps)
    count = min(num_reference_checkpoints(plan.num_epochs, num_checkpoints), len(steps))
    return sorted({math.ceil(len(steps) * n / count) for n in range(1, count + 1)})


def last_steps_of_epochs(steps: Sequence[tuple[int, int, int]]) -> list[int]:
    """Returns the last step of every epoch, counted from 1. steps: those of a plan."""
    last_of_epoch = {epoch: number for number, (epoch, _, _) in enumerate(steps, start=1)}
    return sorted(last_of_epoch.values())


def num_reference_checkpoints(num_epochs: int, num_checkpoints: int | None) -> int:
    """Returns the number of checkpoints of a reference run that has at least as many steps."""
    return num_checkpoints or max(num_epochs, EVERY_EPOCH_FROM)
