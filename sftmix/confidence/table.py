"""The score tables as an artifact: written once, read by any run, refused if they do not match its
data.

    perplexity.parquet   one row per checkpoint and example, in the order of checkpoints and data
    confidence.parquet   one row per example, in the data's order
    not_finite.jsonl     infinite or NaN perplexities, where there are any

Columns: PERPLEXITY_SCHEMA and CONFIDENCE_SCHEMA. Both files carry `ScoreMetadata` as JSON in their
schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.confidence.definition import (
    CONFIDENCE_SCHEMA,
    PERPLEXITY_SCHEMA,
    aggregate,
    confidence_ranks,
    perplexity,
)
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table_files import (
    CONFIDENCE,
    NOT_FINITE,
    PERPLEXITY,
    ROWS_PER_GROUP,
    locate,
    read_column,
    read_schema,
    string_column,
)
from sftmix.errors import ArtifactError, counted
from sftmix.storage import artifacts
from sftmix.storage.failures import accessing

MAX_NAMED = 20  # ids in one message


@dataclass(frozen=True)
class ScoreSummary:
    """mean_confidence: over the finite ones, NaN for none. not_finite: the first 20 ids;
    not_finite.jsonl has all."""

    num_examples: int
    num_checkpoints: int
    mean_confidence: float
    num_not_finite: int
    not_finite: list[str]

    def lines(self) -> list[str]:
        """Returns lines for the screen."""
        sizes = (
            f"{counted(self.num_examples, 'example')},"
            f" {counted(self.num_checkpoints, 'checkpoint')}"
        )
        lines = [
            f"{sizes}, mean confidence {self.mean_confidence:.4g} (minus the perplexity of a"
            " response; -1 is the highest possible)"
        ]
        if self.num_not_finite:
            lines.append(
                f"{counted(self.num_not_finite, 'has', 'have')} no finite confidence"
                f" ({NOT_FINITE}), first: {', '.join(self.not_finite)}"
            )
        return lines


def write_scores(
    folder: Path,
    metadata: ScoreMetadata,
    *,
    example_ids: Sequence[str] | pa.ChunkedArray,
    num_response_tokens: NDArray[np.int64],
    nll_sum: Mapping[int, NDArray[np.float64]],
) -> ScoreSummary:
    """Writes both tables into an existing folder; the caller publishes it.

    num_response_tokens: (N,) int64, at least 1. nll_sum: each checkpoint of the metadata to (N,)
    float64 sums in nats.
    """
    ids, num_examples = string_column(example_ids), len(example_ids)
    assert sorted(nll_sum) == sorted(metadata.checkpoints), (
        f"{sorted(nll_sum)=} {metadata.checkpoints=}"
    )
    assert all(
        len(sums) == num_examples == len(num_response_tokens) for sums in nll_sum.values()
    ), "one sum per example"
    assert (num_response_tokens > 0).all() and pc.count_distinct(ids).as_py() == num_examples, (
        "ids are unique, responses not empty"
    )
    # Ids do not repeat within a row group, so dictionary encoding would not help.
    written: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": ["checkpoint"],
        "write_page_checksum": True,
    }
    schema = metadata.to_schema(PERPLEXITY_SCHEMA)
    with (
        accessing(folder / PERPLEXITY),
        pq.ParquetWriter(folder / PERPLEXITY, schema, **written) as writer,
    ):
        for step in sorted(nll_sum):
            all_sums = nll_sum[step]
            for start in range(0, num_examples, ROWS_PER_GROUP):
                counts = num_response_tokens[start : start + ROWS_PER_GROUP]
                sums = np.asarray(all_sums[start : start + ROWS_PER_GROUP], dtype=np.float64)
                steps = np.full(len(counts), step, dtype=np.int64)
                part = ids.slice(start, len(counts))
                writer.write_table(
                    pa.table([part, steps, sums, counts, perplexity(sums, counts)], schema=schema)
                )
    scores = aggregate(nll_sum, num_response_tokens)
    ranks = confidence_ranks(ids, scores.confidence)
    columns = [ids, scores.confidence, scores.variability, scores.minimum, scores.maximum, ranks]
    table = pa.table(columns, schema=metadata.to_schema(CONFIDENCE_SCHEMA))
    with accessing(folder / CONFIDENCE):
        pq.write_table(table, folder / CONFIDENCE, row_group_size=ROWS_PER_GROUP, **written)
    bad = np.flatnonzero(~np.isfinite(scores.confidence))
    if len(bad):
        write_jsonl(
            folder / NOT_FINITE,
            _not_finite(bad, ids, scores.confidence, num_response_tokens, nll_sum),
        )
    finite = scores.confidence[np.isfinite(scores.confidence)]
    mean = float(finite.mean()) if len(finite) else float("nan")
    return ScoreSummary(
        num_examples,
        len(nll_sum),
        mean,
        len(bad),
        [ids[int(row)].as_py() for row in bad[:MAX_NAMED]],
    )


def _not_finite(
    rows: NDArray[np.int64],
    ids: pa.ChunkedArray,
    confidence: NDArray[np.float64],
    num_response_tokens: NDArray[np.int64],
    nll_sum: Mapping[int, NDArray[np.float64]],
) -> Iterator[dict[str, Any]]:
    """Yields a line for every infinite or NaN perplexity. If only the sum over the checkpoints
    overflows float64, the line names no checkpoint."""
    values = {
        step: perplexity(nll_sum[step][rows], num_response_tokens[rows]) for step in sorted(nll_sum)
    }
    for place, row in enumerate(rows):
        bad: dict[int | None, float] = {
            step: found[place] for step, found in values.items() if not np.isfinite(found[place])
        }
        for step, value in (bad or {None: -confidence[row]}).items():
            yield {
                "example_id": ids[int(row)].as_py(),
                "checkpoint": step,
                "perplexity": str(value),
            }  # JSON has no infinity


@dataclass(frozen=True)
class ScoreTable:
    """An opened table; columns are read on first use. source: the name that the user gave. path:
    the file with one row per example. metadata: None for a table that sftmix did not make. column:
    the column used as confidence."""

    source: str
    path: Path
    metadata: ScoreMetadata | None
    column: str = "confidence"
    revision: str | None = None

    @cached_property
    def example_ids(self) -> pa.ChunkedArray:
        """(N,) strings. Raises ArtifactError for a missing or duplicate id."""
        ids = read_column(self.path, "example_id", pa.string())
        if ids.null_count:
            rows = counted(ids.null_count, "row has", "rows have")
            raise ArtifactError(
                f"{self.path}: {rows} no example_id. Every row needs one; fill or remove such rows."
            )
        if pc.count_distinct(ids).as_py() < len(ids):
            times = pc.value_counts(ids)
            twice = [
                str(pair["values"])
                for pair in times.filter(pc.greater(times.field("counts"), 1)).to_pylist()
            ]
            raise ArtifactError(
                f"{self.path}: {counted(len(twice), 'id stands', 'ids stand')} in several rows"
                f" ({named(twice)}). Keep one row of each."
            )
        return ids

    @cached_property
    def values(self) -> NDArray[np.float64]:
        """(N,) float64: the confidence, or the column used instead; NaN for null."""
        return as_floats(read_column(self.path, self.column, pa.float64()))

    @cached_property
    def confidence(self) -> pa.Table:
        """The columns of CONFIDENCE_SCHEMA. If another column is used as confidence, the rank
        follows that column, and unknown columns are null."""
        is_ours = self.metadata is not None and self.column == "confidence"
        has = set(read_schema(self.path).names) if self.column == "confidence" else set()
        statistics = [
            read_column(self.path, name, pa.float64())
            if is_ours or name in has
            else pa.nulls(len(self.values), pa.float64())
            for name in ("variability", "minimum", "maximum")
        ]
        rank = (
            read_column(self.path, "rank", pa.int64())
            if is_ours
            else confidence_ranks(self.example_ids, self.values)
        )
        schema = (
            self.metadata.to_schema(CONFIDENCE_SCHEMA)
            if is_ours and self.metadata
            else CONFIDENCE_SCHEMA
        )
        return pa.table([self.example_ids, self.values, *statistics, rank], schema=schema)

    @cached_property
    def perplexity_path(self) -> Path:
        """The path of the other file, with one row per checkpoint and example. Raises ArtifactError
        if it does not belong to this table."""
        path = locate(self.source, self.revision, PERPLEXITY)
        metadata = ScoreMetadata.of_file(path)
        if metadata is None or metadata != self.metadata:
            raise ArtifactError(
                f"{path} was not written together with {self.path} (their metadata differ). Get the"
                " table again."
            )
        num_rows, expected = (
            pq.read_metadata(path).num_rows,
            len(self.example_ids) * len(metadata.checkpoints),
        )
        if num_rows != expected:
            raise ArtifactError(
                f"{path} has {counted(num_rows, 'row')};"
                f" {counted(len(self.example_ids), 'example')} under"
                f" {counted(len(metadata.checkpoints), 'checkpoint')} are {expected:,}. Get the"
                " table again."
            )
        return path


def read_scores(
    source: str | Path, revision: str | None = None, *, column: str | None = None
) -> ScoreTable:
    """Returns the table of a folder, of a Hub dataset (at `revision`), or of a Parquet file. A
    manifest in the folder is verified.

    `column` is used as confidence (higher is more confident); a table without sftmix metadata needs
    it. Raises ArtifactError for a missing, damaged or unknown table.
    """
    if revision is not None and Path(source).exists():
        raise ArtifactError(
            f"{source} is on this machine, and revision {revision!r} belongs to a table on the Hub."
            " Leave it out."
        )
    if Path(source).is_dir() and (Path(source) / artifacts.MANIFEST).is_file():
        artifacts.verify(Path(source))
    path = locate(str(source), revision, CONFIDENCE)
    metadata = ScoreMetadata.of_file(path)
    if metadata is None and column is None:
        raise ArtifactError(
            f"{path} has no sftmix metadata, so nothing says what its scores were made with. If it"
            " is a table of your own, name the column to take for the confidence"
            " (`confidence.scores_column=quality`)."
        )
    return ScoreTable(str(source), path, metadata, column or "confidence", revision)


def fit_scores(
    table: ScoreTable,
    example_ids: Sequence[str] | pa.ChunkedArray,
    fingerprints: Mapping[str, str | int],
    *,
    allow_differences: Sequence[str] = (),
    report_to: Path | None = None,
    allow_not_finite: bool = False,
) -> NDArray[np.int64]:
    """Returns the row of the table for each example, (N,) int64, in the order of `example_ids`.

    fingerprints: of the data, as in ScoreMetadata; `data` itself is not compared, its ids are. For
    a table without metadata a message says that fingerprints cannot be compared. Raises
    ArtifactError for other fingerprints that are not in `allow_differences`, for missing or surplus
    ids, and for confidences that are not finite unless allowed. `report_to`: file for all ids; a
    message names 20.
    """
    if report_to is not None:
        report_to.unlink(missing_ok=True)  # left by an earlier attempt
    if table.metadata is None:
        print(
            f"  {table.source} has no sftmix metadata: only its ids are compared with the data, not"
            " how it was made"
        )
    else:
        theirs = table.metadata.fingerprints
        refused = [
            key
            for key in sorted({*theirs, *fingerprints} - {"data", *allow_differences})
            if theirs.get(key) != fingerprints.get(key)
        ]
        if refused:
            found = "; ".join(
                f"{key} is {theirs.get(key)!r} in the table, {fingerprints.get(key)!r} for the data"
                for key in refused
            )
            raise ArtifactError(
                f"{table.source} was made with other settings than this data: {found}. Score this"
                " data itself (`sftmix score CONFIG`), or take the table all the same with"
                f" confidence.allow_differences=[{','.join([*allow_differences, *refused])}]."
            )
    rows = match_rows(table, example_ids, report_to=report_to)
    bad = rows[~np.isfinite(table.values[rows])]
    if len(bad) and not allow_not_finite:
        records = [
            {
                "example_id": table.example_ids[int(row)].as_py(),
                table.column: str(table.values[row]),
            }
            for row in bad
        ]
        where = _report(report_to, ({**record, "problem": "not finite"} for record in records))
        raise ArtifactError(
            f"{table.source}: the {table.column} of {counted(len(bad), 'example')} is infinite, NaN"
            f" or null ({named([str(record['example_id']) for record in records])}){where}. They"
            " cannot be ranked: score them again, or remove these examples from the data and the"
            " table."
        )
    return rows


def match_rows(
    table: ScoreTable,
    example_ids: Sequence[str] | pa.ChunkedArray,
    *,
    report_to: Path | None = None,
) -> NDArray[np.int64]:
    """Returns the row of each id, (N,) int64. Raises ArtifactError for missing or additional
    ids."""
    wanted, ids = string_column(example_ids), table.example_ids
    rows: NDArray[np.int64] = (
        pc.index_in(wanted, value_set=ids).fill_null(-1).to_numpy().astype(np.int64)
    )
    is_used = np.zeros(len(ids), dtype=bool)
    is_used[rows[rows >= 0]] = True
    missing, surplus = (
        wanted.filter(pa.array(rows < 0)).to_pylist(),
        ids.filter(pa.array(~is_used)).to_pylist(),
    )
    if missing or surplus:
        problems = (("missing", missing), ("surplus", surplus))
        where = _report(
            report_to,
            ({"example_id": i, "problem": problem} for problem, found in problems for i in found),
        )
        raise ArtifactError(
            f"{table.source} does not fit the data:"
            f" {counted(len(missing), 'example has', 'examples have')} no score ({named(missing)}),"
            f" {counted(len(surplus), 'score has', 'scores have')} no example"
            f" ({named(surplus)}){where}. Score this data itself (`sftmix score CONFIG`), or use"
            " the data that the table was made from."
        )
    return rows


def named(ids: Sequence[str]) -> str:
    """Returns the first ids for a message."""
    return f"first {', '.join(map(repr, ids[:MAX_NAMED]))}" if ids else "none"


def write_jsonl(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    with accessing(path), path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _report(path: Path | None, records: Iterator[dict[str, Any]]) -> str:
    if path is None:
        return ""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, records)
    return f"; all of them are in {path}"


def as_floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.to_numpy(), dtype=np.float64)  # null becomes NaN


def read_confidence(
    path: Path, example_ids: pa.ChunkedArray, column: str = "confidence"
) -> NDArray[np.float64]:
    """Returns a column (N,) of a table of this run, in the order of `example_ids`; infinite and NaN
    values unchanged.

    Raises ArtifactError for missing or additional examples, or a table that cannot be read.
    """
    table = read_scores(path, column=column)
    return table.values[match_rows(table, example_ids)]
