"""The evaluate stage: every trained model on the held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftmix.confidence.scoring import WorkPlan, score_examples
from sftmix.config.schema import ModelConfig
from sftmix.data.tokenizer import tokenizer_from
from sftmix.engine.engine import Engine
from sftmix.errors import ArtifactError
from sftmix.evaluation.held_out import MODEL_NAMES, summarise, table_of, title_of
from sftmix.evaluation.page import aligned
from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.inputs import read_examples, read_tokenizer, trained_model
from sftmix.storage.failures import accessing
from sftmix.storage.files import write_json

EVALUATION_UNIT = 256  # examples per work unit


def run(context: StageContext) -> Facts:
    """Writes metrics.json (loss, perplexity, exact match) and per_example.parquet."""
    config, ranks = context.config, context.ranks
    examples, tokenizer = read_examples(context, "held_out"), read_tokenizer(context)
    groups = examples.table["group"]
    facts: Facts = {}
    metrics: dict[str, Any] = {}
    tables = []
    for name, model in _models(context).items() if len(examples) else ():
        title = title_of(name)
        engine = Engine(config, model, ranks, tokenizer, progress=context.progress)
        facts["precision"] = engine.precision
        work = WorkPlan(examples.num_tokens, EVALUATION_UNIT, config.evaluation.micro_batch_tokens)
        scores = score_examples(engine, examples, work, pad_id=tokenizer.pad_token_id, title=title)
        engine.close()
        metrics[name] = summarise(scores, list(groups))
        columns = {
            "model": [title] * len(examples),
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
        if set(metrics) - set(MODEL_NAMES):  # those of a training are in the report
            print("", *aligned(*table_of(metrics)), "", sep="\n", flush=True)
    return facts


def _models(context: StageContext) -> dict[str, ModelConfig]:
    """Returns the models to measure, by their stage or their path.

    Raises ArtifactError for a model whose tokens are not those of the data.
    """
    config = context.config
    trained = {
        name: trained_model(config.model, context.inputs[name] / "model")
        for name in MODEL_NAMES
        if name in context.inputs
    }
    own = [] if config.evaluation.trained else [config.model]
    for model in config.evaluation.models:
        _check_tokens(context, model)
    return trained | {str(model.path): model for model in (*own, *config.evaluation.models)}


def _check_tokens(context: StageContext, model: ModelConfig) -> None:
    ours, theirs = read_tokenizer(context), tokenizer_from(Path(str(model.path)))
    used = sorted({i for ids in read_examples(context, "held_out").table["input_ids"] for i in ids})
    names = zip(*(each.convert_ids_to_tokens(used) for each in (ours, theirs)), strict=True)
    for number, (mine, other) in zip(used, names, strict=True):
        if mine != other:
            raise ArtifactError(
                f"{model.path}: its token {number} is {other!r}, and that of the data is {mine!r}."
                " Losses per token of other tokens cannot be compared: measure this model by"
                f" itself, `sftmix evaluate {model.path} data.path=...`.",
                on_all_ranks=True,
            )
