"""What each stage does: read its inputs' folders, work, write into its own. No stage calls another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix.config.schema import ModelConfig, TrainConfig
from sftmix.meter import describe_time
from sftmix.pipeline.run import StageContext
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sftmix.data.batches import TokenisedExamples
    from sftmix.engine.engine import Engine
    from sftmix.scoring import OnlineScores
    from sftmix.train import TrainingPlan


def run_data(context: StageContext) -> None:
    """Reads, checks and encodes all examples."""
    from sftmix.data.prepare import prepare

    summary, identity, fingerprints = prepare(context.config, context.folder)
    for line in summary.lines():
        print(f"  {line}")
    context.facts |= {"identity": identity, "fingerprints": fingerprints}


def run_reference(context: StageContext) -> None:
    """Trains the reference model with next-token prediction. Leaves what `confidence.mode` wants of it: checkpoints, each a
    Hugging Face folder; the scores of passes inside the run (live); those of its own forwards (online)."""
    from sftmix.objectives import Objective
    from sftmix.pairing import singles
    from sftmix.pipeline.score_stage import work_plan, write_sums
    from sftmix.scoring import OnlineScores, score_examples
    from sftmix.train import TrainingPlan, choose_checkpoint_steps

    config, ranks = context.config, context.ranks
    assert ranks is not None
    settings, modes = config.reference_train, config.confidence.modes
    examples = _examples(context, "train")
    plan = TrainingPlan(singles(len(examples), seed=config.run.seed), settings.epochs, settings.batch_size)
    steps = choose_checkpoint_steps(plan, config.reference.num_checkpoints)
    context.facts["checkpoint_steps"] = steps
    tokenizer = _tokenizer(context)
    online = OnlineScores(ranks, len(examples)) if "online" in modes else None
    live = context.kept / "live"  # a file for each pass, so that a resumed run has those before it

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

    objective = Objective()
    _train(
        context, "reference", config.reference_model, settings, examples, plan, objective,
        checkpoint_steps=steps, save=at_checkpoint, online=online,
    )  # fmt: skip
    if ranks.is_main:
        if "live" in modes:
            passes = context.folder / live.name
            write_sums(context.folder / "live.parquet", {step: np.load(passes / f"{checkpoint_name(step)}.npy") for step in steps})
            shutil.rmtree(passes)
        if online is not None:
            write_sums(context.folder / "online.parquet", online.nll_sum)


def run_score(context: StageContext) -> None:
    """Scores every training example, and writes the tables: one pair for `confidence.mode`, one for each mode compared."""
    from sftmix.pipeline.score_stage import import_scores, read_sums, score_checkpoints, write_tables

    config = context.config
    examples = _examples(context, "train")
    if config.confidence.scores is not None:
        import_scores(context, examples)
        return
    reference = context.inputs.get("reference")
    modes: list[str] = [*config.confidence.modes] or ["models"]
    for mode in modes:
        if mode in ("live", "online"):
            assert reference is not None
            precision = context.facts_of("reference")["precision"]
            nll_sum = read_sums(reference / f"{mode}.parquet", len(examples))
            if mode == "online":
                nll_sum = dict(sorted(nll_sum.items())[config.confidence.online_from_epoch - 1 :])
        elif mode == "checkpoints":
            steps = context.facts_of("reference")["checkpoint_steps"]
            folders = {step: context.inputs["reference"] / "checkpoints" / checkpoint_name(step) for step in steps}
            models = {step: trained_model(config.reference_model, folder) for step, folder in folders.items()}
            nll_sum = score_checkpoints(context, examples, _tokenizer(context), models)
        else:
            models = dict(enumerate(config.confidence.models, start=1))
            nll_sum = score_checkpoints(context, examples, _tokenizer(context), models)
        if mode in ("checkpoints", "models"):
            precision = context.facts["precision"]
        is_first = mode in (config.confidence.mode, "models")
        if context.ranks is None or context.ranks.is_main:
            folder = context.folder if is_first else context.folder / "compared" / mode
            write_tables(context, folder, mode, examples, nll_sum, precision=precision)


def run_split(context: StageContext) -> None:
    """Splits the training examples, and says how much of them either way of matching would mix."""
    from sftmix.pipeline.split_stage import mix_coverages, split_scores, write_parts

    examples = _examples(context, "train")
    sizes = split_scores(context, examples)
    print("  " + ", ".join(f"{count:,} {part}" for part, count in sizes.items()))
    lengths = examples.column("num_response_tokens")
    write_parts(context.folder, sizes, lengths)
    coverage = mix_coverages(context.folder, lengths, context.config)
    shown = ", ".join(f"{share:.1%} {way}" for way, share in coverage.items())
    print(f"  mix coverage ({COVERAGE}): {shown} matching")
    context.facts |= {"sizes": sizes, "mix_coverage": coverage}


def run_baseline(context: StageContext) -> None:
    """Trains the target with next-token prediction alone, in the data order of SFTMix."""
    _run_target(context, "baseline", mixup_weight=0.0)


def run_train(context: StageContext) -> None:
    """Trains the target with SFTMix."""
    _run_target(context, "sftmix", mixup_weight=context.config.mixup.weight)


def _run_target(context: StageContext, name: str, *, mixup_weight: float) -> None:
    from sftmix.objectives import Objective
    from sftmix.pipeline.split_stage import open_matching
    from sftmix.train import TrainingPlan

    config = context.config
    settings = config.train
    examples = _examples(context, "train")
    objective = Objective(mixup_weight, config.mixup.site)
    if objective.mixes_inputs:
        examples.check_single_spans()
    matching = open_matching(context.inputs["split"], config, config.mixup.matching)
    assert matching.num_examples == len(examples), "the split is of other data than the data stage, whose digest it carries"
    plan = TrainingPlan(matching, settings.epochs, settings.batch_size)

    def save_model(engine: Engine, step: int) -> None:
        engine.export(context.kept / "model", _tokenizer(context))
        if engine.has_adapters:
            engine.export_adapter(context.kept / "adapter", _tokenizer(context))
        if context.ranks is not None and context.ranks.is_main:
            from sftmix.cards import write_model_card

            write_model_card(context.kept / "model", config, name)
            if engine.has_adapters:
                write_model_card(context.kept / "adapter", config, name, is_adapter=True)

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
    online: OnlineScores | None = None,
) -> None:
    from sftmix.engine.distributed import use_threads
    from sftmix.engine.engine import Engine
    from sftmix.resume import TrainingCheckpoints
    from sftmix.runlog import RunLog
    from sftmix.skipped import SkippedSteps
    from sftmix.train import train

    config, ranks = context.config, context.ranks
    assert ranks is not None and context.stop is not None
    tokenizer = _tokenizer(context)
    engine = Engine(config, model, ranks, tokenizer, train=settings)
    kept = context.kept
    identity = vars(context.identity)
    checkpoints = TrainingCheckpoints(ranks, context.work / "checkpoints", kept, config.checkpoint, context.stop, **identity)
    limit = max(config.limits.skipped_steps, 20 if engine.precision == "fp16" else 0)  # fp16 looks for its loss scale by overflowing
    log = RunLog(
        name,
        ranks,
        metrics=kept / "metrics.jsonl",
        tensorboard=config.run.dir / "logs" / "tensorboard" / name if config.log.tensorboard else None,
        every_steps=config.log.every_steps,
        has_mixup=objective.mixup_weight > 0,
        has_router=engine.module.has_router,
        meter=context.meter,
    )
    context.stop.listen()
    try:
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
            online=online,
            checkpoints=checkpoints,
            skipped=SkippedSteps(ranks, kept / "skipped_steps.jsonl", examples.example_ids, limit=limit),
        )
    finally:
        context.stop.close()
    if ranks.is_main:
        # Linked, not moved: the checkpoints vouch for these files until the output is published.
        shutil.copytree(kept, context.folder, copy_function=_link, dirs_exist_ok=True)
    context.facts |= {
        "num_parameters": engine.num_parameters,
        "num_trained_parameters": engine.num_trained_parameters,
        "world_size": ranks.world_size,
        "precision": engine.precision,
        "num_threads": use_threads(None),
    }
    engine.close()
    context.facts |= log.facts()
    if ranks.is_main:
        print(f"  {describe_time(context.facts)}", flush=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another volume, or one that has no links
        shutil.copy2(source, target)


def run_evaluate(context: StageContext) -> None:
    """Measures every trained model on the held-out examples: loss, perplexity, and exact match."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sftmix.engine.engine import Engine
    from sftmix.evaluate import summarise
    from sftmix.scoring import WorkPlan, score_examples

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
        context.facts["precision"] = engine.precision
        work = WorkPlan(examples.num_tokens, EVALUATION_UNIT, config.evaluation.micro_batch_tokens)
        scores = score_examples(engine, examples, work, pad_id=tokenizer.pad_token_id, title=MODEL_NAMES[name])
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
        write_json(context.folder / "metrics.json", metrics)
        if tables:
            path = context.folder / "per_example.parquet"
            with accessing(path):
                pq.write_table(pa.concat_tables(tables), path)


def run_report(context: StageContext) -> None:
    """Writes the report and prints its table."""
    from sftmix.report.build import build_report

    build_report(context)


def trained_model(start: ModelConfig, folder: Path) -> ModelConfig:
    """Returns the model that was trained from `start` into `folder`, with its other settings (attention, trust).
    Adapters are merged into it."""
    return start.model_copy(update={"path": str(folder), "architecture": None, "revision": None, "lora": None})


COVERAGE = "share of the response tokens that are mixed with another example's"
EVALUATION_UNIT = 256  # examples that one rank takes at a time
MODEL_NAMES = {"baseline": "NTP baseline", "train": "SFTMix"}


def checkpoint_name(step: int) -> str:
    """Returns the folder name of a reference checkpoint."""
    return f"step_{step:06d}"


def read_metrics_json(path: Path) -> dict[str, Any]:
    """Returns the content of `evaluation/metrics.json`."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _examples(context: StageContext, part: str) -> TokenisedExamples:
    from sftmix.data.batches import TokenisedExamples

    return TokenisedExamples(context.inputs["data"] / f"{part}.arrow")


def _tokenizer(context: StageContext) -> PreTrainedTokenizerBase:
    from sftmix.data.tokenizer import tokenizer_from

    return tokenizer_from(context.inputs["data"] / "tokenizer")
