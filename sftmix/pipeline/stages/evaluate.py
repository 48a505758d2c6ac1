"""The evaluate stage: every trained model on the held-out examples."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sftmix.confidence.scoring import WorkPlan, score_examples
from sftmix.engine.engine import Engine
from sftmix.evaluation.held_out import MODEL_NAMES, summarise
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
    for name, title in MODEL_NAMES.items():
        if name not in context.inputs or not len(examples):
            continue
        model = trained_model(config.model, context.inputs[name] / "model")
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
    return facts
