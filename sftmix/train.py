"""The one training loop. Reference run, baseline and SFTMix differ only in the plan and the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sftmix.config.schema import TrainConfig
from sftmix.data.batches import TokenisedExamples, collate, count_step, cut_step
from sftmix.engine.engine import Engine
from sftmix.objectives import Objective
from sftmix.pairing import Matching
from sftmix.runlog import RunLog
from sftmix.storage import faults

if TYPE_CHECKING:
    from sftmix.resume import Resumable, TrainingCheckpoints
    from sftmix.scoring import OnlineScores
    from sftmix.skipped import SkippedSteps


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, in order. A pure function of seed and scores; holds no state."""

    matching: Matching
    num_epochs: int
    batch_size: int

    def steps(self) -> list[tuple[int, int, int]]:
        """Returns (epoch, first unit, end unit) of every optimiser step."""
        bounds = [self.matching.step(number, self.batch_size) for number in range(self.matching.num_steps(self.batch_size))]
        return [(epoch, start, stop) for epoch in range(self.num_epochs) for start, stop in bounds if start < stop]


def train(
    engine: Engine,
    examples: TokenisedExamples,
    plan: TrainingPlan,
    objective: Objective,
    settings: TrainConfig,
    log: RunLog,
    *,
    seed: int,
    pad_id: int,
    checkpoint_steps: Sequence[int] = (),
    save_checkpoint: Callable[[int], None] | None = None,
    online: OnlineScores | None = None,
    checkpoints: TrainingCheckpoints | None = None,
    skipped: SkippedSteps | None = None,
) -> None:
    """Takes every step of the plan; calls `save_checkpoint(step)` after each of `checkpoint_steps`. All ranks.

    `online` collects the token losses of each epoch. `checkpoints` saves the state, and takes up from it. `skipped` decides how many
    steps may be skipped. Raises TrainingError where that is exceeded, StoppedError where the run was asked to stop.
    """
    steps = plan.steps()
    parts: dict[str, Resumable] = {"log": log} | ({"online": online} if online is not None else {})
    done = checkpoints.resume(engine, parts) if checkpoints is not None else 0
    log.start(num_steps=len(steps), after=done)
    for step, (epoch, start, stop) in enumerate(steps[done:], start=done + 1):
        drawn = plan.matching.units(epoch, start, stop)
        units = np.arange(len(drawn.units))

        # Counts come from the plan, before any forward, so that every rank divides by the same global number.
        counts = count_step(drawn, units, examples.num_response_tokens)
        pieces = cut_step(
            drawn,
            units,
            examples.num_tokens,
            micro_batch_tokens=settings.micro_batch_tokens,
            num_ranks=engine.ranks.world_size,
        )[engine.ranks.rank]

        faults.point("train.step")
        engine.start_step(seed=seed, step=step)
        for number, piece in enumerate(pieces, start=1):
            batch = collate(examples, drawn, piece, pad_id=pad_id, mixes_inputs=objective.mixes_inputs)
            loss = engine.forward_backward(batch, counts, objective, is_last=number == len(pieces))
            log.add(batch, loss)
            if online is not None:
                online.add(batch, loss)
            if skipped is not None:
                skipped.add(batch, loss)

        learning_rate = learning_rate_at(step, num_steps=len(steps), settings=settings)
        grad_norm = engine.step(learning_rate=learning_rate)
        log.end_step(
            step,
            counts=counts,
            lam=drawn.lam[drawn.units[:, 1] >= 0],
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            is_skipped=engine.was_step_skipped,
            epoch=epoch,
        )
        if skipped is not None:
            skipped.end_step(step, is_skipped=engine.was_step_skipped)
        if online is not None and (step == len(steps) or steps[step][0] != epoch):
            online.end_epoch(step)
        if step in checkpoint_steps and save_checkpoint is not None:
            with log.pause():
                save_checkpoint(step)
        if checkpoints is not None:
            checkpoints.end_step(engine, step, is_last=step == len(steps), parts=parts, pause=log.pause)
    log.finish()


def learning_rate_at(step: int, *, num_steps: int, settings: TrainConfig) -> float:
    """Returns the learning rate of optimiser step 1..num_steps: linear warm-up to the peak, then the schedule towards 0."""
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, num_steps - warmup)  # below 1: the last step still learns
    match settings.schedule:
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return settings.learning_rate * (1 - progress)
        case "constant":
            return settings.learning_rate


def choose_checkpoint_steps(plan: TrainingPlan, num_checkpoints: int | None) -> list[int]:
    """Returns the steps after which the reference run keeps a checkpoint, the last step among them.

    Chosen (the paper leaves the places open): the end of every epoch, or 3 evenly spaced ones where there are
    fewer than 3 epochs; `num_checkpoints` spaces that many evenly.
    """
    steps = plan.steps()
    if num_checkpoints is None:
        if plan.num_epochs >= 3:
            last_of_epoch = {epoch: number for number, (epoch, _, _) in enumerate(steps, start=1)}
            return sorted(last_of_epoch.values())
        num_checkpoints = 3
    num_checkpoints = min(num_checkpoints, len(steps))
    return sorted({math.ceil(len(steps) * n / num_checkpoints) for n in range(1, num_checkpoints + 1)})
