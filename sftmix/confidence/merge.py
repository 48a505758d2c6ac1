"""Merge score tables: of disjoint examples, or of the same examples under disjoint checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table import (
    MAX_NAMED,
    ScoreSummary,
    ScoreTable,
    named,
    read_scores,
    write_scores,
)
from sftmix.confidence.table_files import CONFIDENCE, read_column, refuse_existing
from sftmix.errors import ArtifactError, ConfigError, counted
from sftmix.storage import artifacts
from sftmix.storage.files import sha256_of_file

Sums = dict[int, NDArray[np.float64]]  # checkpoint -> (N,) nats


def merge_scores(sources: Sequence[str], to: Path) -> ScoreSummary:
    """Publishes the merged table as a folder with a manifest. Ranks and aggregates are recomputed.
    All tables are held in memory.

    Disjoint examples need equal metadata except for the data; equal examples need the same mode and
    fingerprints. Raises ArtifactError for anything else, with the reason, and ConfigError if `to`
    exists.
    """
    refuse_existing(to)
    if len(set(sources)) < max(2, len(sources)):
        raise ConfigError(
            f"scores merge: expected two or more tables, each once; found {', '.join(sources)}."
            " Name another."
        )
    tables = [read_scores(source) for source in sources]
    ids = [set(table.example_ids.to_pylist()) for table in tables]
    num_distinct = len(set().union(*ids))
    if num_distinct == sum(map(len, ids)):
        metadata = _metadata_of_more_examples(tables)
        parts = [_read_sums(table) for table in tables]
        example_ids = [i for table in tables for i in table.example_ids.to_pylist()]
        num_response_tokens = np.concatenate([counts for _, counts in parts])
        nll_sum = {
            step: np.concatenate([sums[step] for sums, _ in parts]) for step in metadata.checkpoints
        }
    elif all(len(found) == num_distinct for found in ids):
        metadata = _metadata_of_more_checkpoints(tables)
        example_ids = tables[0].example_ids.to_pylist()
        nll_sum, num_response_tokens = _sums_of_more_checkpoints(tables)
    else:
        raise _overlap(tables, ids)
    inputs = {table.source: sha256_of_file(table.perplexity_path) for table in tables}
    with artifacts.publish(
        to, stage="scores merge", settings={"tables": list(sources)}, inputs=inputs
    ) as folder:
        return write_scores(
            folder,
            metadata,
            example_ids=example_ids,
            num_response_tokens=num_response_tokens,
            nll_sum=nll_sum,
        )


def _metadata_of_more_examples(tables: Sequence[ScoreTable]) -> ScoreMetadata:
    metadata = [_metadata(table) for table in tables]
    _refuse_differences(
        tables,
        ("mode", "models", "checkpoints", "fingerprints", "versions", "commit"),
        "different examples",
    )
    # it belongs to no data stage
    fingerprints = {key: value for key, value in metadata[0].fingerprints.items() if key != "data"}
    return replace(
        metadata[0], dataset=_each_once(m.dataset for m in metadata), fingerprints=fingerprints
    )


def _metadata_of_more_checkpoints(tables: Sequence[ScoreTable]) -> ScoreMetadata:
    metadata = [_metadata(table) for table in tables]
    # The steps of two reference runs would look like those of one run.
    is_models = metadata[0].mode == "models"
    _refuse_differences(
        tables, ("mode", "fingerprints", *(() if is_models else ("models",))), "the same examples"
    )
    steps = sorted(step for m in metadata for step in m.checkpoints)
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        raise ArtifactError(
            f"{', '.join(table.source for table in tables)} hold the same examples, and several of"
            f" them the checkpoints {', '.join(map(str, twice))}. Tables of the same examples can"
            " be merged where no checkpoint is in two of them; take one."
        )
    data = {m.fingerprints.get("data") for m in metadata}
    fingerprints = {
        key: value
        for key, value in metadata[0].fingerprints.items()
        if key != "data" or len(data) == 1
    }
    numbered = sorted(
        (pair for m in metadata for pair in zip(m.checkpoints, m.models, strict=False)),
        key=lambda pair: pair[0],
    )
    names = _each_once(m.versions for m in metadata)
    return replace(
        metadata[0],
        checkpoints=steps,
        models=[model for _, model in numbered] if is_models else metadata[0].models,
        dataset=_each_once(m.dataset for m in metadata),
        fingerprints=fingerprints,
        versions={
            name: ", ".join(_each_once([m.versions[name]] for m in metadata if name in m.versions))
            for name in names
        },
        commit=", ".join(_each_once([m.commit] for m in metadata if m.commit)) or None,
    )


def _refuse_differences(tables: Sequence[ScoreTable], names: Sequence[str], what: str) -> None:
    first = _flat(_metadata(tables[0]), names)
    for table in tables[1:]:
        other = _flat(_metadata(table), names)
        keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
        if keys:
            found = "; ".join(
                f"{key} is {first.get(key)!r} in {tables[0].source}, {other.get(key)!r} in"
                f" {table.source}"
                for key in keys
            )
            raise ArtifactError(
                f"Tables of {what} can be merged where {', '.join(names)} are equal: {found}. Score"
                " one of them again."
            )


def _flat(metadata: ScoreMetadata, names: Sequence[str]) -> dict[str, Any]:
    """Returns the metadata fields to compare, each fingerprint separately. The data fingerprint is
    left out, because ids and counts are compared instead."""
    return {
        name: value
        for name, value in asdict(metadata).items()
        if name in names and name != "fingerprints"
    } | {
        f"fingerprints.{key}": value
        for key, value in metadata.fingerprints.items()
        if key != "data"
    }


def _sums_of_more_checkpoints(tables: Sequence[ScoreTable]) -> tuple[Sums, NDArray[np.int64]]:
    """Returns the sums of all tables and the counts, in the order of the first one's examples."""
    wanted = tables[0].example_ids
    nll_sum, num_response_tokens = _read_sums(tables[0])
    for table in tables[1:]:
        sums, counts = _read_sums(table)
        rows = pc.index_in(wanted, value_set=table.example_ids).to_numpy()
        differ = np.flatnonzero(counts[rows] != num_response_tokens)
        if len(differ):
            raise ArtifactError(
                f"{table.source}: {counted(len(differ), 'example has', 'examples have')} another"
                f" number of response tokens than in {tables[0].source}"
                f" ({named([wanted[int(row)].as_py() for row in differ[:MAX_NAMED]])}). Merge"
                " tables that were made from the same data."
            )
        nll_sum |= {step: values[rows] for step, values in sums.items()}
    return nll_sum, num_response_tokens


def _read_sums(table: ScoreTable) -> tuple[Sums, NDArray[np.int64]]:
    """Returns each checkpoint's (N,) sums and the (N,) counts of response tokens, in the order of
    the table's ids."""
    path, ids = table.perplexity_path, table.example_ids
    kinds = {
        "example_id": pa.string(),
        "checkpoint": pa.int64(),
        "nll_sum": pa.float64(),
        "num_response_tokens": pa.int64(),
    }
    rows = pa.table({name: read_column(path, name, kind) for name, kind in kinds.items()})
    nll_sum: Sums = {}
    counts = None
    for step in _metadata(table).checkpoints:
        part = rows.filter(pc.equal(rows["checkpoint"], step))
        places = pc.index_in(ids, value_set=part["example_id"])
        if len(part) != len(ids) or places.null_count or part["num_response_tokens"].null_count:
            raise ArtifactError(
                f"{path}: checkpoint {step} has not one row for each example of {CONFIDENCE}. Get"
                " the table again."
            )
        part = part.take(places)
        nll_sum[step], found = part["nll_sum"].to_numpy(), part["num_response_tokens"].to_numpy()
        counts = found if counts is None else counts
        if (found != counts).any() or (found < 1).any():
            raise ArtifactError(
                f"{path}: num_response_tokens differs between checkpoints, or is below 1. Get the"
                " table again."
            )
    assert counts is not None, f"{path} has checkpoints, or its metadata would have been refused"
    return nll_sum, counts


def _overlap(tables: Sequence[ScoreTable], ids: Sequence[set[str]]) -> ArtifactError:
    for (a, ids_a), (b, ids_b) in itertools.combinations(zip(tables, ids, strict=True), 2):
        shared = sorted(ids_a & ids_b)
        if shared and ids_a != ids_b:
            return ArtifactError(
                f"{a.source} ({counted(len(ids_a), 'example')}) and {b.source} ({len(ids_b)}) share"
                f" {len(shared)} ({named(shared)}). Tables can be merged that share no example, or"
                " all. Score the missing ones, or leave one table out."
            )
    return ArtifactError(
        f"Of {', '.join(table.source for table in tables)}, some share all examples and some none."
        " Merge those that share all first, then what comes out of it with the others."
    )


def _metadata(table: ScoreTable) -> ScoreMetadata:
    assert table.metadata is not None, f"{table.source} was read without naming a column"
    return table.metadata


def _each_once(groups: Any) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))
