"""What each stage does: read its inputs' folders, work, write into its own. No stage calls another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix import artifacts
from sftmix.config import ModelConfig, TrainConfig
from sftmix.pipeline import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftmix.data.batches import TokenisedExamples
    from sftmix.engine.engine import Engine
    from sftmix.train import TrainingPlan


def run_data(context: StageContext) -> None:
    """Reads, checks and encodes all examples."""
    from sftmix.data.prepare import prepare

    summary, identity = prepare(context.config, context.folder)
    for line in summary.lines():
        print(f"  {line}")
    context.facts["identity"] = identity


def run_reference(context: StageContext) -> None:
    """Trains the reference model with next-token prediction and keeps checkpoints, each a Hugging Face folder."""
    from sftmix.objectives import Objective
    from sftmix.pairing import plan_epoch_without_pairs
    from sftmix.train import TrainingPlan, choose_checkpoint_steps

    config = context.config
    settings = config.reference_train
    examples = _examples(context, "train")
    plan = TrainingPlan(
        [plan_epoch_without_pairs(len(examples), seed=config.run.seed, epoch=epoch) for epoch in range(settings.epochs)],
        settings.batch_size,
    )
    steps = choose_checkpoint_steps(plan, config.reference.num_checkpoints)
    context.facts["checkpoint_steps"] = steps

    def save(engine: Engine, step: int) -> None:
        engine.export(context.folder / "checkpoints" / checkpoint_name(step), _tokenizer(context))

    _train(context, "reference", config.reference_model, settings, examples, plan, Objective(), checkpoint_steps=steps, save=save)


def run_score(context: StageContext) -> None:
    """Scores every training example under every checkpoint, and writes the two tables."""
    import pyarrow.parquet as pq

    from sftmix.confidence import confidence_table, perplexity, perplexity_table
    from sftmix.engine.engine import Engine
    from sftmix.scoring import score_examples

    config, ranks = context.config, context.ranks
    assert ranks is not None
    examples, tokenizer = _examples(context, "train"), _tokenizer(context)
    steps = context.facts_of("reference")["checkpoint_steps"]
    nll_sum: dict[int, Any] = {}
    for step in steps:
        checkpoint = context.inputs["reference"] / "checkpoints" / checkpoint_name(step)
        engine = Engine(config, trained_model(config.reference_model, checkpoint), ranks, tokenizer)
        scores = score_examples(
            engine,
            examples,
            micro_batch_tokens=config.confidence.micro_batch_tokens,
            pad_id=tokenizer.pad_token_id,
            title=f"step {step}",
        )
        nll_sum[step] = scores.nll_sum
        engine.close()
        if ranks.is_main:
            mean = float(scores.nll_sum.sum() / scores.num_response_tokens.sum())
            print(f"  checkpoint {step}: {len(examples):,} examples, {mean:.4f} nats per response token")
    if ranks.is_main:
        counts = examples.num_response_tokens
        pq.write_table(perplexity_table(examples.example_ids, nll_sum, counts), context.folder / "perplexity.parquet")
        perplexities = np.stack([perplexity(nll_sum[step], counts) for step in steps])
        pq.write_table(confidence_table(examples.example_ids, perplexities), context.folder / "confidence.parquet")


def run_split(context: StageContext) -> None:
    """Splits the training examples by confidence."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sftmix.confidence import read_confidence
    from sftmix.errors import ArtifactError
    from sftmix.pairing import CONFIDENT, MIDDLE, UNCONFIDENT, split_by_confidence

    split = context.config.split
    examples = _examples(context, "train")
    confidence = read_confidence(context.inputs["score"] / "confidence.parquet", examples.example_ids)
    try:
        parts = split_by_confidence(
            examples.example_ids, confidence, confident_share=split.confident_share, unconfident_share=split.unconfident_share
        )
    except ValueError as error:
        raise ArtifactError(f"{error}. Lower the reference's learning rate, or remove these examples.") from None
    table = pa.table({"example_id": examples.example_ids, "confidence": confidence, "part": parts})
    pq.write_table(table, context.folder / "split.parquet")
    sizes = {part: parts.count(part) for part in (CONFIDENT, MIDDLE, UNCONFIDENT)}
    context.facts["sizes"] = sizes
    print("  " + ", ".join(f"{count:,} {part}" for part, count in sizes.items()))


def run_baseline(context: StageContext) -> None:
    """Trains the target with next-token prediction alone, in the data order of SFTMix."""
    _run_target(context, "baseline", mixup_weight=0.0)


def run_train(context: StageContext) -> None:
    """Trains the target with SFTMix."""
    _run_target(context, "sftmix", mixup_weight=context.config.mixup.weight)


def _run_target(context: StageContext, name: str, *, mixup_weight: float) -> None:
    from sftmix.objectives import Objective
    from sftmix.pairing import plan_epoch
    from sftmix.train import TrainingPlan

    config = context.config
    settings, seed = config.train, config.run.seed
    examples = _examples(context, "train")
    parts = read_split(context.inputs["split"] / "split.parquet", examples.example_ids)
    objective = Objective(mixup_weight, config.mixup.site)
    if objective.mixes_inputs:
        examples.check_single_spans()
    plan = TrainingPlan(
        [plan_epoch(examples.example_ids, parts, seed=seed, epoch=epoch, alpha=config.mixup.alpha) for epoch in range(settings.epochs)],
        settings.batch_size,
    )

    def save_model(engine: Engine, step: int) -> None:
        engine.export(context.folder / "model", _tokenizer(context))
        if context.ranks is not None and context.ranks.is_main:
            from sftmix.export import write_model_card

            write_model_card(context.folder / "model", config, objective=name)

    last = len(plan.steps())
    _train(context, name, config.model, settings, examples, plan, objective, checkpoint_steps=[last], save=save_model)


def _train(
    context: StageContext,
    name: str,
    model: ModelConfig,
    settings: TrainConfig,
    examples: TokenisedExamples,
    plan: TrainingPlan,
    objective: Any,
    *,
    checkpoint_steps: list[int],
    save: Any,
) -> None:
    from sftmix.engine.engine import Engine
    from sftmix.runlog import RunLog
    from sftmix.train import train

    config, ranks = context.config, context.ranks
    assert ranks is not None
    tokenizer = _tokenizer(context)
    engine = Engine(config, model, ranks, tokenizer, train=settings)
    log = RunLog(
        name,
        ranks,
        metrics=context.folder / "metrics.jsonl",
        tensorboard=config.run.dir / "logs" / "tensorboard" / name if config.log.tensorboard else None,
        every_steps=config.log.every_steps,
        has_mixup=objective.mixup_weight > 0,
        has_router=engine.module.has_router,
    )
    train(
        engine,
        examples,
        plan,
        objective,
        settings,
        log,
        seed=config.run.seed,
        pad_id=tokenizer.pad_token_id,
        checkpoint_steps=checkpoint_steps,
        save_checkpoint=lambda step: save(engine, step),
    )
    context.facts |= log.facts() | {"num_parameters": engine.num_parameters, "world_size": ranks.world_size}
    engine.close()


def run_evaluate(context: StageContext) -> None:
    """Measures every trained model on the held-out examples: loss, perplexity, and exact match."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sftmix.engine.engine import Engine
    from sftmix.evaluate import summarise
    from sftmix.scoring import score_examples

    config, ranks = context.config, context.ranks
    assert ranks is not None
    examples, tokenizer = _examples(context, "held_out"), _tokenizer(context)
    groups = examples.table["group"]
    metrics: dict[str, Any] = {}
    tables = []
    for name in ("baseline", "train"):
        if name not in context.inputs or not len(examples):
            continue
        engine = Engine(config, trained_model(config.model, context.inputs[name] / "model"), ranks, tokenizer)
        scores = score_examples(
            engine,
            examples,
            micro_batch_tokens=config.evaluation.micro_batch_tokens,
            pad_id=tokenizer.pad_token_id,
            title=MODEL_NAMES[name],
        )
        engine.close()
        metrics[name] = summarise(scores, list(groups))
        columns = {
            "model": [MODEL_NAMES[name]] * len(examples),
            "example_id": examples.example_ids,
            "group": groups,
            "nll_sum": scores.nll_sum,
            "num_response_tokens": scores.num_response_tokens,
            "is_exact": scores.is_exact,
        }
        tables.append(pa.table(columns))
    if ranks.is_main:
        artifacts.write_json(context.folder / "metrics.json", metrics)
        if tables:
            pq.write_table(pa.concat_tables(tables), context.folder / "per_example.parquet")


def run_report(context: StageContext) -> None:
    """Writes the report and prints its table."""
    from sftmix.report.build import build_report

    build_report(context)


def trained_model(start: ModelConfig, folder: Path) -> ModelConfig:
    """Returns the model that was trained from `start` into `folder`, with its other settings (attention, trust)."""
    return start.model_copy(update={"path": str(folder), "architecture": None, "revision": None})


MODEL_NAMES = {"baseline": "NTP baseline", "train": "SFTMix"}


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a reference checkpoint."""
    return f"step_{step:06d}"


def read_split(path: Path, example_ids: list[str]) -> list[str]:
    """Returns the part of every example, in the order of `example_ids`. The split was made from this very data."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["example_id", "part"])
    assert table["example_id"].to_pylist() == example_ids, f"{path} lists other examples than the data stage, whose digest it carries"
    return [str(part) for part in table["part"].to_pylist()]


def read_metrics_json(path: Path) -> dict[str, Any]:
    """Returns the content of `evaluation/metrics.json`."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _examples(context: StageContext, part: str) -> TokenisedExamples:
    from sftmix.data.batches import TokenisedExamples

    return TokenisedExamples(context.inputs["data"] / f"{part}.arrow")


def _tokenizer(context: StageContext) -> PreTrainedTokenizerBase:
    from sftmix.data.tokenizer import tokenizer_from

    return tokenizer_from(context.inputs["data"] / "tokenizer")
