"""The one training loop. Reference run, baseline and SFTMix differ only in the plan and the
objective."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from sftmix.batches.ahead import BatchMaker, StepBatches
from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence.online import OnlineScores
from sftmix.config.schema import TrainConfig
from sftmix.engine.engine import Engine
from sftmix.loss.objective import Objective
from sftmix.storage import faults
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.collector import collector_between_steps
from sftmix.train.example_weights import weigh_examples
from sftmix.train.held_out import HeldOutLoss, HeldOutLosses
from sftmix.train.log import RunLog
from sftmix.train.meter import EVALUATION, StepTrace
from sftmix.train.plan import TrainingPlan, learning_rate_at
from sftmix.train.resuming import Resumable
from sftmix.train.skipped_steps import SkippedSteps


@dataclass(frozen=True)
class TrainingRun:
    """Everything that one training needs.

    pad_id: token of padding. checkpoint_steps, save_checkpoint: `save_checkpoint(step)` is called
    after each of these steps and after the last one; with `keep_best`, after each that has the
    lowest held-out loss so far. log: the metrics. checkpoints: saves the state, and loads it after
    an interruption. skipped: limits the number of steps without finite gradients. trace: of some
    steps. online: collects the token losses of each epoch, if needed. held_out: measures the
    held-out loss, if asked for.
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
    trace: StepTrace
    online: OnlineScores | None = None
    held_out: HeldOutLosses | None = None


def train(run: TrainingRun) -> None:
    """Runs every step of the plan, or fewer if the held-out loss does not improve any more.
    Collective: all ranks must call it.

    Raises TrainingError if too many steps in a row had no finite gradients, StoppedError if the run
    was asked to stop.
    """
    engine, plan, log, online = run.engine, run.plan, run.log, run.online
    held_out = run.held_out
    keeps_best = held_out is not None and held_out.keeps_best
    steps = plan.steps()
    parts: dict[str, Resumable] = {"log": log} | ({"online": online} if online is not None else {})
    if held_out is not None and held_out.decides:
        parts["held_out"] = held_out
    done = run.checkpoints.resume(engine, parts)
    maker = BatchMaker(
        run.examples,
        plan.matching,
        micro_batch_tokens=run.settings.micro_batch_tokens,
        num_ranks=engine.ranks.world_size,
        rank=engine.ranks.rank,
        packs=engine.packs,
        square_share=engine.flops.square_share,
        pad_id=run.pad_id,
        mixes_inputs=run.objective.mixes_inputs,
        pins=engine.ranks.device.type == "cuda",
    )
    log.start(num_steps=len(steps), after=done)
    with (
        collector_between_steps(),
        closing(maker.ahead(steps[done:])) as batches,
    ):
        for step, (epoch, _, _) in enumerate(steps[done:], start=done + 1):
            with log.counting("waiting"):
                made = next(batches)
            run.trace.begin_step(step)
            measured = _take_step(run, step, made, epoch=epoch, num_steps=len(steps))
            is_last = step == len(steps) or (held_out is not None and held_out.is_over)
            run.trace.end_step(step, is_last=is_last)
            if online is not None and (is_last or steps[step][0] != epoch):
                online.end_epoch(step)
            is_best = keeps_best and measured is not None and measured.is_best
            if is_best or (not keeps_best and (is_last or step in run.checkpoint_steps)):
                with log.pause():
                    run.save_checkpoint(step)
            run.checkpoints.end_step(engine, step, is_last=is_last, parts=parts, pause=log.pause)
            with log.counting("collector"):
                gc.collect()
            if is_last:
                break
    log.finish()
    if held_out is not None and engine.ranks.is_main:
        _say_choice(held_out, step=log.num_steps, num_steps=len(steps))


def _say_choice(held_out: HeldOutLosses, *, step: int, num_steps: int) -> None:
    if step < num_steps:
        print(
            f"  stopped after step {step} of {num_steps}: the held-out loss of step"
            f" {held_out.best_step} is the lowest (train.patience)",
            flush=True,
        )
    if held_out.keeps_best:
        print(f"  the model of step {held_out.best_step} is kept (train.keep_best)", flush=True)


def _take_step(
    run: TrainingRun, step: int, made: StepBatches, *, epoch: int, num_steps: int
) -> HeldOutLoss | None:
    engine, held_out = run.engine, run.held_out
    faults.point("train.step")
    engine.start_step(seed=run.seed, step=step)
    batches = weigh_examples(engine, made.micro_batches, made.counts, run.objective.next_token)
    for number, batch in enumerate(batches, start=1):
        loss = engine.forward_backward(
            batch, made.counts, run.objective, is_last=number == len(batches)
        )
        run.log.add(batch, loss)
        if run.online is not None:
            run.online.add(batch, loss)
        run.skipped.add(batch, loss)
    learning_rate = learning_rate_at(step, num_steps=num_steps, settings=run.settings)
    grad_norm = engine.step(learning_rate=learning_rate)
    measured = None
    if held_out is not None and held_out.is_due(step):
        with run.log.pause(EVALUATION):
            measured = held_out.measure(step)
    run.log.end_step(
        step,
        counts=made.counts,
        balance=made.balance,
        lam=made.drawn.lam[made.drawn.units[:, 1] >= 0],
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        is_skipped=engine.was_step_skipped,
        epoch=epoch,
        held_out=measured,
        is_last=held_out is not None and held_out.is_over,
    )
    run.skipped.end_step(step, is_skipped=engine.was_step_skipped)
    return measured
