"""The split stage's work: the table of scores beside what the data knows, split on files, and what a matching would mix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.config import Config
from sftmix.errors import ArtifactError, ConfigError
from sftmix.pairing import Matching, match_parts, mix_coverage
from sftmix.pipeline import StageContext
from sftmix.split import split_table

if TYPE_CHECKING:
    from sftmix.data.batches import TokenisedExamples

COVERAGE_UNITS = 200_000  # of an epoch's first units; their coverage is the epoch's to a fraction of a percent


def split_scores(context: StageContext, examples: TokenisedExamples) -> dict[str, int]:
    """Writes split.parquet: example_id and part, in the data's order. Returns the sizes of the parts.

    Raises ConfigError for a column that is not there, ArtifactError for values that cannot be ranked.
    """
    from sftmix.scores import match_rows, read_scores

    split = context.config.split
    table = read_scores(context.inputs["score"])
    columns = pq.read_schema(table.path).names
    if split.column not in columns:
        raise ConfigError(f"split.column: the score table has no column {split.column!r}. It has {', '.join(columns)}.")
    if split.stratify_by is not None and split.stratify_by not in examples.table.column_names:
        raise ConfigError(
            f"split.stratify_by: the data has no column {split.stratify_by!r}. It has {', '.join(examples.table.column_names)}."
        )
    match_rows(table, examples.example_ids)  # the scores are of these examples, each once
    values = pq.read_table(table.path, columns=[split.column])[split.column]
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise ConfigError(f"split.column: {split.column} is {values.type}, and only numbers can be ranked.")
    if not split.highest_is_confident:
        values = pa.compute.negate(values)
    columns_in = {"example_id": table.example_ids, "value": values}
    if split.stratify_by is not None:
        columns_in["stratum"] = pa.chunked_array(examples.table.data.table[split.stratify_by].chunks)
    ranked = context.folder / "ranked.parquet"
    pq.write_table(pa.table(columns_in), ranked)
    try:
        return split_table(
            [ranked],
            context.folder / "split.parquet",
            value="value",
            confident_share=split.confident_share,
            unconfident_share=split.unconfident_share,
            stratum="stratum" if split.stratify_by else None,
        )
    except ValueError as error:
        message = str(error).replace("value of", f"{split.column} of", 1)
        raise ArtifactError(f"{message}. Lower the reference's learning rate, or remove these examples.") from None
    finally:
        ranked.unlink()


def matching_of(config: Config, parts: NDArray[np.str_], num_response_tokens: NDArray[np.int64], way: str) -> Matching:
    """Returns the run's matching of (N,) parts, in one `way` of `mixup.matching`."""
    return match_parts(
        parts,
        num_response_tokens,
        seed=config.run.seed,
        alpha=config.mixup.alpha,
        by_length=way == "length",
        block_pairs=config.mixup.length_block,
    )


def mix_coverages(parts: NDArray[np.str_], num_response_tokens: NDArray[np.int64], config: Config) -> dict[str, float]:
    """Returns, for random matching and for matching by length, the share of response tokens that take part in a mix in the first epoch."""
    found = {}
    for way in ("random", "length"):
        matching = matching_of(config, parts, num_response_tokens, way)
        drawn = matching.units(0, 0, min(COVERAGE_UNITS, matching.num_units))
        found[way] = mix_coverage(drawn, num_response_tokens)
    return found
