"""The reference stage: next-token prediction on all examples, which produces the input of the
confidence."""

from __future__ import annotations

import shutil

import numpy as np

from sftmix.confidence.online import OnlineScores
from sftmix.confidence.scoring import score_examples
from sftmix.engine.engine import Engine
from sftmix.loss.objective import Objective
from sftmix.pairing.matching import singles
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.inputs import checkpoint_name, read_examples, read_tokenizer
from sftmix.pipeline.stages.score import work_plan, write_sums
from sftmix.pipeline.stages.training import train_model
from sftmix.storage.failures import accessing
from sftmix.train.plan import TrainingPlan, choose_checkpoint_steps


def run(context: StageContext) -> Facts:
    """Trains the reference model. Writes what `confidence.mode` needs: checkpoints, each a Hugging
    Face folder; scores of passes during the run (live); scores of the training forwards
    (online)."""
    config, ranks = context.config, context.ranks
    settings, modes = config.reference_train, config.confidence.modes
    examples, tokenizer = read_examples(context), read_tokenizer(context)
    plan = TrainingPlan(
        singles(len(examples), seed=config.run.seed), settings.epochs, settings.batch_size
    )
    steps = choose_checkpoint_steps(plan, config.reference.num_checkpoints)
    online = OnlineScores(ranks, len(examples)) if "online" in modes else None
    live = context.kept / "live"  # one file per pass, so that a resumed run has the earlier ones

    def at_checkpoint(engine: Engine, step: int) -> None:
        if "checkpoints" in modes:
            engine.export(context.kept / "checkpoints" / checkpoint_name(step), tokenizer)
        if "live" in modes:
            shown = {"pad_id": tokenizer.pad_token_id, "title": f"step {step}"}
            nll_sum = score_examples(engine, examples, work_plan(config, examples), **shown).nll_sum
            if ranks.is_main:
                live.mkdir(exist_ok=True)
                path = live / f"{checkpoint_name(step)}.npy"
                with accessing(path):
                    np.save(path, nll_sum)

    facts = train_model(
        context,
        name="reference",
        model=config.reference_model,
        settings=settings,
        tokenizer=tokenizer,
        examples=examples,
        plan=plan,
        objective=Objective(),
        checkpoint_steps=steps,
        save=at_checkpoint,
        online=online,
    )
    if ranks.is_main:
        if "live" in modes:
            passes = context.folder / live.name
            write_sums(
                context.folder / "live.parquet",
                {step: np.load(passes / f"{checkpoint_name(step)}.npy") for step in steps},
            )
            shutil.rmtree(passes)
        if online is not None:
            write_sums(context.folder / "online.parquet", online.nll_sum)
    return {"checkpoint_steps": steps, **facts}
