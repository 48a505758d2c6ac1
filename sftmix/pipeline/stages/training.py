"""Code shared by the three trainings. Reference, baseline and SFTMix differ in the plan, the
objective and what they save."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sftmix.batches.balance import expected_useful_share
from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence.online import OnlineScores
from sftmix.confidence.scoring import WorkPlan, score_examples
from sftmix.config.schema import Config, ModelConfig, TrainConfig
from sftmix.engine.engine import Engine
from sftmix.engine.precision import DTYPES
from sftmix.engine.process_group import use_threads
from sftmix.errors import ArtifactError
from sftmix.loss.flops import peak_flops
from sftmix.loss.objective import Objective
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.inputs import checkpoint_name, read_examples
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.held_out import HeldOutLosses
from sftmix.train.log import RunLog
from sftmix.train.loop import TrainingRun, train
from sftmix.train.meter import PartTimer, StepTrace, describe_time
from sftmix.train.plan import TrainingPlan
from sftmix.train.skipped_steps import SkippedSteps
from sftmix.train.trackers import TrackedStage, Trackers

ENOUGH = 0.8  # useful share of the ranks' time, below which a larger batch is named
BEST = "best"
UNIT_EXAMPLES = 64  # held-out examples that a rank takes at a time
FP16_SKIPPED_STEPS = 20  # with fp16 the loss scale is found by overflows


def train_model(
    context: StageContext,
    *,
    name: str,
    model: ModelConfig,
    settings: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: TokenisedExamples,
    plan: TrainingPlan,
    objective: Objective,
    checkpoint_steps: list[int],
    save: Callable[[Engine, int], None],
    online: OnlineScores | None = None,
) -> Facts:
    """Trains one model, from its last checkpoint if there is one. `save(engine, step)` writes the
    outputs into `context.kept`, with `keep_best` into `best_folder(context, step)`. Returns the
    facts of the training. Collective: all ranks must call it.

    Raises ArtifactError if held-out losses are asked for and no example is held out.
    """
    config, ranks, kept = context.config, context.ranks, context.kept
    parts = PartTimer(ranks.device)
    engine = Engine(
        config,
        model,
        ranks,
        tokenizer,
        train=settings,
        progress=context.progress,
        timer=parts.during,
    )
    limit = max(
        config.limits.skipped_steps, FP16_SKIPPED_STEPS if engine.precision == "fp16" else 0
    )
    log = _log(context, engine, parts, name=name, has_mixup=objective.mixup_weight > 0)
    held_out = _held_out(context, engine, settings, plan, pad_id=tokenizer.pad_token_id)
    checkpoints = TrainingCheckpoints(
        ranks,
        context.work / "checkpoints",
        kept,
        config.checkpoint,
        context.stop,
        **vars(context.identity),
        check=context.lock.check if context.lock is not None else None,
    )

    def save_checkpoint(step: int) -> None:
        save(engine, step)
        if settings.keep_best:
            checkpoints.remove_outdated(kept / BEST, step)

    run = TrainingRun(
        engine=engine,
        examples=examples,
        plan=plan,
        objective=objective,
        settings=settings,
        seed=config.run.seed,
        pad_id=tokenizer.pad_token_id,
        checkpoint_steps=checkpoint_steps,
        save_checkpoint=save_checkpoint,
        log=log,
        checkpoints=checkpoints,
        skipped=SkippedSteps(
            ranks, kept / "skipped_steps.jsonl", examples.example_ids, limit=limit
        ),
        trace=StepTrace(
            config.log.profile_steps,
            config.run.dir / "logs" / "traces" / f"{name}_rank_{ranks.rank:04d}.json.gz",
            ranks.device,
        ),
        online=online,
        held_out=held_out,
    )
    if ranks.is_main and ranks.world_size > 1:
        _say_idle(run)
    context.stop.listen()
    try:
        train(run)
    finally:
        context.stop.close()
    if ranks.is_main:
        # Link instead of move, because checkpoints record the hashes of these files until the
        # output is published.
        linked: dict[str, Any] = {"copy_function": _link, "dirs_exist_ok": True}
        ignored = shutil.ignore_patterns(BEST)
        shutil.copytree(kept, context.folder, ignore=ignored, **linked)
        if held_out is not None and settings.keep_best:
            shutil.copytree(best_folder(context, held_out.best_step), context.folder, **linked)
    facts: dict[str, Any] = {
        "num_parameters": engine.num_parameters,
        "num_trained_parameters": engine.num_trained_parameters,
        "world_size": ranks.world_size,
        "precision": engine.precision,
        "device": ranks.device_name,
        "num_threads": use_threads(None),
        "packs": engine.packs,
    }
    if held_out is not None:
        facts["num_planned_steps"], facts["best_step"] = len(plan.steps()), held_out.best_step
    engine.close()
    facts |= log.facts()
    if ranks.is_main:
        print(f"  {describe_time(facts)}", flush=True)
    return facts


def best_folder(context: StageContext, step: int) -> Path:
    """Returns the folder for the model after a step, which has the lowest held-out loss so far."""
    return context.kept / BEST / checkpoint_name(step)


def _held_out(
    context: StageContext,
    engine: Engine,
    settings: TrainConfig,
    plan: TrainingPlan,
    *,
    pad_id: int,
) -> HeldOutLosses | None:
    if settings.evaluate_every is None:
        return None
    examples, config = read_examples(context, "held_out"), context.config
    if not len(examples):
        raise ArtifactError(
            "train.evaluate_every measures held-out losses, and no example of this data is held"
            " out. Hold out more of them (data.held_out_share), or leave train.evaluate_every out.",
            on_all_ranks=True,
        )
    work = WorkPlan(examples.num_tokens, UNIT_EXAMPLES, config.evaluation.micro_batch_tokens)
    return HeldOutLosses(
        settings,
        plan.steps(),
        lambda title: score_examples(engine, examples, work, pad_id=pad_id, title=title),
    )


def _log(
    context: StageContext, engine: Engine, parts: PartTimer, *, name: str, has_mixup: bool
) -> RunLog:
    settings, logs = context.config.log, context.config.run.dir / "logs"
    return RunLog(
        name,
        engine.ranks,
        metrics=context.kept / "metrics.jsonl",
        tensorboard=logs / "tensorboard" / name if settings.tensorboard else None,
        trackers=_trackers(context.config, name),
        every_steps=settings.every_steps,
        has_mixup=has_mixup,
        has_router=engine.module.has_router,
        meter=context.meter,
        parts=parts,
        flops=engine.flops,
        peak_flops=peak_flops(engine.ranks.device, DTYPES[engine.precision]),
    )


def _trackers(config: Config, name: str) -> Trackers | None:
    if not config.log.trackers:
        return None
    logs = config.run.dir / "logs"
    stage = TrackedStage(
        project=config.log.project,
        group=config.run.dir.resolve().name,
        stage=name,
        config=config.model_dump(mode="json"),
        folder=logs / "trackers",
    )
    state = logs / "trackers" / f"{name}.json"
    return Trackers(config.log.trackers, stage, state=state)


def _say_idle(run: TrainingRun) -> None:
    """Says that the batch is too small for the ranks, and which one would do."""
    num_ranks, batch_size = run.engine.ranks.world_size, run.settings.batch_size

    def share(size: int) -> float:
        return expected_useful_share(
            run.plan.matching,
            run.examples.num_tokens,
            batch_size=size,
            micro_batch_tokens=run.settings.micro_batch_tokens,
            num_ranks=num_ranks,
            packs=run.engine.packs,
            square_share=run.engine.flops.square_share,
        )

    now = share(batch_size)
    if not now < ENOUGH:
        return
    sizes = [batch_size * 2**n for n in range(1, 7)]
    larger = next((size for size in sizes if share(size) >= ENOUGH), None)
    hint = (
        f"train.batch_size={larger} would give {share(larger):.0%}"
        if larger is not None
        else "no batch up to 64 times as large would do"
    )
    print(
        f"  train.batch_size={batch_size} keeps {num_ranks} ranks busy {now:.0%} of the time: they"
        f" wait for the slowest. {hint}; other learning rates may suit it. Or use fewer ranks.",
        flush=True,
    )


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another volume, or one without hard links
        shutil.copy2(source, target)
