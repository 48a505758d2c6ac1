"""The one training loop. Reference run, baseline and SFTMix differ only in the plan and the
objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sftmix.batches.balance import balance_of
from sftmix.batches.collate import collate
from sftmix.batches.cut import count_step, cut_step
from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence.online import OnlineScores
from sftmix.config.schema import TrainConfig
from sftmix.engine.engine import Engine
from sftmix.loss.objective import Objective
from sftmix.storage import faults
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.log import RunLog
from sftmix.train.plan import TrainingPlan, learning_rate_at
from sftmix.train.resuming import Resumable
from sftmix.train.skipped_steps import SkippedSteps


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one training needs.

    pad_id: token of padding. checkpoint_steps, save_checkpoint: `save_checkpoint(step)` is called
    after each of these steps. log: the metrics. checkpoints: saves the state, and loads it after an
    interruption. skipped: limits the number of steps without finite gradients. online: collects the
    token losses of each epoch, if needed.
    """

    engine: Engine
    examples: TokenisedExamples
    plan: TrainingPlan
    objective: Objective
    settings: TrainConfig
    seed: int
    pad_id: int
    checkpoint_steps: Sequence[int]
    save_checkpoint: Callable[[int], None]
    log: RunLog
    checkpoints: TrainingCheckpoints
    skipped: SkippedSteps
    online: OnlineScores | None = None


def train(run: TrainingRun) -> None:
    """Runs every step of the plan. Collective: all ranks must call it.

    Raises TrainingError if too many steps in a row had no finite gradients, StoppedError if the run
    was asked to stop.
    """
    engine, plan, settings, log, online = run.engine, run.plan, run.settings, run.log, run.online
    steps, square_share = plan.steps(), engine.square_share
    parts: dict[str, Resumable] = {"log": log} | ({"online": online} if online is not None else {})
    done = run.checkpoints.resume(engine, parts)
    log.start(num_steps=len(steps), after=done)
    for step, (epoch, start, stop) in enumerate(steps[done:], start=done + 1):
        drawn = plan.matching.units(epoch, start, stop)
        units = np.arange(len(drawn.units))

        # Counts come from the plan, before any forward, so that every rank divides by the same
        # global number.
        counts = count_step(drawn, units, run.examples.num_response_tokens)
        cut = cut_step(
            drawn,
            units,
            run.examples.num_tokens,
            micro_batch_tokens=settings.micro_batch_tokens,
            num_ranks=engine.ranks.world_size,
            packs=engine.packs,
            square_share=square_share,
        )
        pieces = cut[engine.ranks.rank]

        faults.point("train.step")
        engine.start_step(seed=run.seed, step=step)
        for number, piece in enumerate(pieces, start=1):
            batch = collate(
                run.examples,
                drawn,
                piece,
                pad_id=run.pad_id,
                mixes_inputs=run.objective.mixes_inputs,
                packs=engine.packs,
            )
            loss = engine.forward_backward(
                batch, counts, run.objective, is_last=number == len(pieces)
            )
            log.add(batch, loss)
            if online is not None:
                online.add(batch, loss)
            run.skipped.add(batch, loss)

        learning_rate = learning_rate_at(step, num_steps=len(steps), settings=settings)
        grad_norm = engine.step(learning_rate=learning_rate)
        log.end_step(
            step,
            counts=counts,
            balance=balance_of(
                drawn,
                cut,
                run.examples.num_tokens,
                packs=engine.packs,
                square_share=square_share,
            ),
            lam=drawn.lam[drawn.units[:, 1] >= 0],
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            is_skipped=engine.was_step_skipped,
            epoch=epoch,
        )
        run.skipped.end_step(step, is_skipped=engine.was_step_skipped)
        if online is not None and (step == len(steps) or steps[step][0] != epoch):
            online.end_epoch(step)
        if step in run.checkpoint_steps:
            with log.pause():
                run.save_checkpoint(step)
        run.checkpoints.end_step(
            engine, step, is_last=step == len(steps), parts=parts, pause=log.pause
        )
    log.finish()
