"""The baseline and train stages: train the target model with next-token prediction only, and with
SFTMix."""

from __future__ import annotations

from sftmix.engine.engine import Engine
from sftmix.evaluation.model_cards import write_model_card
from sftmix.loss.objective import Objective
from sftmix.pairing.on_files import open_matching
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.inputs import read_examples, read_tokenizer
from sftmix.pipeline.stages.training import best_folder, train_model
from sftmix.train.plan import TrainingPlan


def run_baseline(context: StageContext) -> Facts:
    """Trains the target without Mixup, in the data order of SFTMix."""
    return _train_target(
        context, "baseline", Objective(next_token=context.config.baseline.objective)
    )


def run_train(context: StageContext) -> Facts:
    """Trains the target with next-token prediction and Mixup."""
    mixup, next_token = context.config.mixup, context.config.objective
    return _train_target(context, "sftmix", Objective(mixup.weight, mixup.site, next_token))


def _train_target(context: StageContext, name: str, objective: Objective) -> Facts:
    """Trains the target model. name: "baseline" or "sftmix"."""
    config = context.config
    settings = config.train
    examples, tokenizer = read_examples(context), read_tokenizer(context)
    if objective.mixes_inputs:
        examples.check_single_spans()
    matching = open_matching(context.inputs["split"], config.mixup, config.run.seed)
    assert matching.num_examples == len(examples), (
        "the split is of other data than the data stage, whose digest it carries"
    )
    plan = TrainingPlan(matching, settings.epochs, settings.batch_size)

    def save_model(engine: Engine, step: int) -> None:
        folder = best_folder(context, step) if settings.keep_best else context.kept
        engine.export(folder / "model", tokenizer)
        if engine.has_adapters:
            engine.export_adapter(folder / "adapter", tokenizer)
        if context.ranks.is_main:
            write_model_card(folder / "model", config, name)
            if engine.has_adapters:
                write_model_card(folder / "adapter", config, name, is_adapter=True)

    return train_model(
        context,
        name=name,
        model=config.model,
        settings=settings,
        tokenizer=tokenizer,
        examples=examples,
        plan=plan,
        objective=objective,
        checkpoint_steps=[len(plan.steps())],
        save=save_model,
    )
