"""The score stage: score every training example under every checkpoint, in units that survive a
kill, and write the tables of every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.scoring import WorkPlan, score_units
from sftmix.confidence.table import ScoreTable, fit_scores, read_scores, write_scores
from sftmix.confidence.table_files import CONFIDENCE
from sftmix.confidence.units import UnitFolder
from sftmix.config.schema import Config, ModelConfig
from sftmix.engine.engine import Engine
from sftmix.engine.precision import resolve_precision
from sftmix.engine.process_group import use_threads
from sftmix.engine.ranks import should_shard
from sftmix.errors import ArtifactError, counted
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.order import model_identity
from sftmix.pipeline.stages.inputs import (
    checkpoint_name,
    read_examples,
    read_tokenizer,
    trained_model,
)
from sftmix.pipeline.unshared_folder import collect_units
from sftmix.storage import provenance
from sftmix.storage.failures import accessing
from sftmix.storage.files import await_visible

# checkpoint -> (N,) nats over the response tokens, in dataset order
Sums = dict[int, NDArray[np.float64]]


def run(context: StageContext) -> Facts:
    """Writes the tables: one pair for `confidence.mode`, one for each mode compared."""
    config, examples = context.config, read_examples(context)
    if config.confidence.scores is not None:
        import_scores(context, examples)
        return {}
    facts: Facts = {}
    reference = context.inputs.get("reference")
    modes: list[str] = [*config.confidence.modes] or ["models"]
    for mode in modes:
        if mode in ("live", "online"):
            assert reference is not None, f"config refuses {mode} without a reference run"
            precision = context.facts_of("reference")["precision"]
            nll_sum = read_sums(reference / f"{mode}.parquet", len(examples))
            if mode == "online":
                nll_sum = dict(sorted(nll_sum.items())[config.confidence.online_from_epoch - 1 :])
        else:
            facts["num_threads"] = use_threads(None)
            nll_sum, precision = score_checkpoints(context, examples, _models(context, mode))
            facts["precision"] = precision
        if context.ranks.is_main:
            is_first = mode in (config.confidence.mode, "models")
            folder = context.folder if is_first else context.folder / "compared" / mode
            write_tables(context, folder, mode, examples, nll_sum, precision=precision)
    return facts


def _models(context: StageContext, mode: str) -> dict[int, ModelConfig]:
    """Returns the models to score with, by checkpoint number."""
    config = context.config
    if mode == "models":
        return dict(enumerate(config.confidence.models, start=1))
    checkpoints = context.inputs["reference"] / "checkpoints"
    steps = context.facts_of("reference")["checkpoint_steps"]
    return {
        step: trained_model(config.reference_model, checkpoints / checkpoint_name(step))
        for step in steps
    }


def work_plan(config: Config, examples: TokenisedExamples) -> WorkPlan:
    """Returns how the training examples are divided into work."""
    return WorkPlan(
        examples.num_tokens, config.confidence.unit_examples, config.confidence.micro_batch_tokens
    )


def score_checkpoints(
    context: StageContext, examples: TokenisedExamples, models: dict[int, ModelConfig]
) -> tuple[Sums, str]:
    """Scores every example under every model, by checkpoint number. Skips what an earlier attempt
    has scored. Collective: all ranks must call it. Returns the sums, on rank 0 only, and the dtype
    of the models' weights."""
    config, ranks = context.config, context.ranks
    tokenizer, plan = read_tokenizer(context), work_plan(config, examples)
    # For existing units. Their fingerprint contains the dtype, which was checked on the engine that
    # wrote them.
    precision = resolve_precision(config.engine.precision)
    sizes = [len(plan.examples(unit)) for unit in range(plan.num_units)]
    nll_sum: Sums = {}
    for step, model in models.items():
        wanted = config.confidence.sharding
        is_sharded = (
            should_shard(weight_bytes(model), ranks) if wanted == "auto" else wanted == "zero3"
        )
        # A unit's fingerprint contains everything that can change a bit of a score, including
        # package versions.
        parts = [
            context.identity.fingerprint,
            plan.unit_examples,
            plan.micro_batch_tokens,
            is_sharded,
            config.engine.packing,
            provenance.versions(),
            provenance.commit(),
        ]
        done_units = UnitFolder(
            context.work / f"checkpoint_{step:06d}", provenance.fingerprint(parts)
        )
        collect_units(ranks, done_units, sizes)  # from an earlier attempt on other disks
        units = ranks.from_main(done_units.pending(sizes) if ranks.is_main else [])
        if ranks.is_main and len(units) < len(sizes):
            print(
                f"  checkpoint {step}: {len(sizes) - len(units)} of {counted(len(sizes), 'unit')}"
                " already scored",
                flush=True,
            )
        if units:
            engine = Engine(
                config, model, ranks, tokenizer, is_sharded=is_sharded, progress=context.progress
            )
            precision = engine.precision
            score_units(
                engine,
                examples,
                plan,
                units,
                done_units.write,
                pad_id=tokenizer.pad_token_id,
                title=f"step {step}",
            )
            ranks.barrier()
            engine.close()
            collect_units(ranks, done_units, sizes)
        if not ranks.is_main:
            continue
        for unit in units:
            await_visible(done_units.manifest(unit))
        missing = done_units.pending(sizes)
        if missing:
            raise ArtifactError(
                f"the scores of {counted(len(missing), 'unit')} of {len(sizes)} are missing in"
                f" {done_units.folder} though every rank has finished. Look at whether run.dir is"
                " the same folder, whole and writable, on every node; then start again."
            )
        nll_sum[step] = np.concatenate(
            [done_units.read(unit).nll_sum for unit in range(len(sizes))]
        )
        mean = float(nll_sum[step].sum() / examples.num_response_tokens.sum())
        print(
            f"  checkpoint {step}: {counted(len(examples), 'example')}, {mean:.4f} nats per"
            " response token",
            flush=True,
        )
    return nll_sum, precision


def weight_bytes(model: ModelConfig) -> int:
    """Returns the size of a model's weight files; 0 (treated as small) for a model that is not a
    local folder."""
    files = Path(model.path).glob("*.safetensors") if model.path else ()
    return sum(file.stat().st_size for file in files)


def write_tables(
    context: StageContext,
    folder: Path,
    mode: str,
    examples: TokenisedExamples,
    nll_sum: Sums,
    *,
    precision: str,
) -> None:
    """Writes the two tables of one mode, and reports perplexities that are not finite. precision:
    dtype of the scoring weights."""

    config = context.config
    models = config.confidence.models or [config.reference_model]
    metadata = ScoreMetadata(
        mode=mode,
        models=[model_identity(model) for model in models],
        checkpoints=sorted(nll_sum),
        fingerprints={**context.facts_of("data")["fingerprints"], "dtype": precision},
        dataset=[source.path for source in config.data.all_sources] or ["generated toy skills"],
        versions=provenance.versions(),
        commit=provenance.commit(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    summary = write_scores(
        folder,
        metadata,
        example_ids=examples.example_ids,
        num_response_tokens=examples.num_response_tokens,
        nll_sum=nll_sum,
    )
    for line in summary.lines():
        print(f"  {line}")


def import_scores(context: StageContext, examples: TokenisedExamples) -> None:
    """Uses a published table instead of scoring: checked against the data, and reordered to match
    it."""
    table, rows = fit_table(context.config, examples, context.facts_of("data")["fingerprints"])
    path = context.folder / CONFIDENCE
    with accessing(path):
        pq.write_table(table.confidence.take(pa.array(rows)), path)
    print(f"  {counted(len(rows), 'score')} of {context.config.confidence.scores}")


def fit_table(
    config: Config, examples: TokenisedExamples, fingerprints: dict[str, str | int]
) -> tuple[ScoreTable, NDArray[np.int64]]:
    """Returns the table of `confidence.scores`, and its row for each example, (N,). fingerprints:
    of the data stage. Raises ArtifactError if the table does not fit the examples."""
    settings = config.confidence
    assert settings.scores is not None, "the caller looked"
    table = read_scores(
        settings.scores, revision=settings.scores_revision, column=settings.scores_column
    )
    rows = fit_scores(
        table,
        examples.example_ids,
        {**fingerprints, "dtype": resolve_precision(config.engine.precision)},
        allow_differences=settings.allow_differences,
        report_to=config.run.dir / "scores_that_do_not_fit.jsonl",
    )
    return table, rows


def write_sums(path: Path, nll_sum: Sums) -> None:
    """Writes the scores made by a training run: one column per checkpoint, rows in dataset
    order."""
    with accessing(path):
        pq.write_table(pa.table({str(step): sums for step, sums in nll_sum.items()}), path)


def read_sums(path: Path, num_examples: int) -> Sums:
    """Returns what `write_sums` wrote."""
    table: Any = pq.read_table(path)
    assert table.num_rows == num_examples, (
        f"{path} is of other data than the data stage, whose digest its stage carries"
    )
    return {int(name): table[name].to_numpy() for name in table.column_names}
