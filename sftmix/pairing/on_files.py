"""Split and matching on files: the parts as lists of indices, and how much a matching would mix.

The only lists in memory are the response lengths and, to sort a part by length, the indices of that
part.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.config.schema import MixupConfig, SplitConfig
from sftmix.errors import ArtifactError, ConfigError, counted
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching, mix_coverage
from sftmix.pairing.permutation import permute
from sftmix.pairing.split import split_table
from sftmix.storage.failures import accessing

# number of units from an epoch's beginning; their coverage equals the epoch's within a fraction of
# a percent
COVERAGE_UNITS = 200_000
SPLIT = "split.parquet"
RANDOM = "random"  # split.column: by chance, whatever the scores say
COVERAGE = "share of the response tokens that are mixed with another example's"
ROWS_PER_GROUP = 1 << 17  # read at a time


def split_scores(
    table: Path, data: pa.Table, split: SplitConfig, folder: Path, *, seed: int
) -> dict[str, int]:
    """Writes split.parquet into `folder`: example_id and part, in the data's order. Returns the
    sizes of the parts.

    table: file of the scores. data: the training examples, with their ids and, for
    `split.stratify_by`, that column. seed: of the random split. Raises ConfigError for a column
    that is not there, ArtifactError for values that cannot be ranked.
    """
    schema, is_random = pq.read_schema(table), split.column == RANDOM
    if is_random == (split.column in schema.names):
        raise ConfigError(
            f"split.column: the score table has a column {RANDOM!r}, and this word splits by"
            " chance. Rename the column."
            if is_random
            else f"split.column: the score table has no column {split.column!r}. It has"
            f" {', '.join(schema.names)}."
        )
    if split.stratify_by is not None and split.stratify_by not in data.column_names:
        raise ConfigError(
            f"split.stratify_by: the data has no column {split.stratify_by!r}. It has"
            f" {', '.join(data.column_names)}."
        )
    kind = pa.int64() if is_random else schema.field(split.column).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise ConfigError(
            f"split.column: {split.column} is {kind}, and only numbers can be ranked."
        )
    beside = folder / "to_split.parquet"
    is_beside = is_random or split.stratify_by is not None
    _check_order(table, split, data, beside if is_beside else None, seed)
    try:
        with accessing(folder / SPLIT):
            return split_table(
                [beside if is_beside else table],
                folder / SPLIT,
                value=split.column,
                highest_first=split.highest_is_confident,
                confident_share=split.confident_share,
                unconfident_share=split.unconfident_share,
                stratum="stratum" if split.stratify_by else None,
            )
    except ValueError as error:
        raise ArtifactError(
            f"{error}. Lower the reference's learning rate, or remove these examples."
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def _check_order(
    table: Path, split: SplitConfig, data: pa.Table, beside: Path | None, seed: int
) -> None:
    """Raises ArtifactError unless the table lists the data's examples in the data's order, as the
    score stage writes it. Writes `beside`: the table's ids and values (or random ones), and the
    data's column of `split.stratify_by` as "stratum"."""
    num_rows, is_random = pq.read_metadata(table).num_rows, split.column == RANDOM
    if num_rows != data.num_rows:
        found = f"{counted(num_rows, 'row')} for {counted(data.num_rows, 'example')}"
        raise ArtifactError(f"{table} has {found}. Run the score stage again.")
    writer, start = None, 0
    try:
        for batch in pq.ParquetFile(table).iter_batches(
            ROWS_PER_GROUP, columns=["example_id", *([] if is_random else [split.column])]
        ):
            if not pa.chunked_array([batch["example_id"]]).equals(
                data["example_id"].slice(start, len(batch))
            ):
                raise ArtifactError(
                    f"{table} is not in the order of the data, near row {start:,}. Run the score"
                    " stage again."
                )
            if beside is not None:
                rows = np.arange(start, start + len(batch))
                values = permute(rows, num_rows, RANDOM, seed) if is_random else batch[split.column]
                columns = {"example_id": batch["example_id"], split.column: values}
                if split.stratify_by is not None:
                    columns["stratum"] = data[split.stratify_by].slice(start, len(batch))
                lines = pa.table(columns)
                writer = writer or pq.ParquetWriter(beside, lines.schema)
                writer.write_table(lines)
            start += len(batch)
    finally:
        if writer is not None:
            writer.close()


def write_parts(
    folder: Path, sizes: dict[str, int], num_response_tokens: NDArray[np.integer[Any]]
) -> None:
    """Writes the dataset indices of each part of split.parquet beside it, int64: NAME.npy in the
    data's order, and of the two parts that are paired NAME_by_length.npy, shortest response first,
    ties in the data's order."""
    lists = {part: _new_list(folder / f"{part}.npy", size) for part, size in sizes.items()}
    start, written = 0, dict.fromkeys(sizes, 0)
    for batch in pq.ParquetFile(folder / SPLIT).iter_batches(ROWS_PER_GROUP, columns=["part"]):
        for part, indices in lists.items():
            found = start + np.flatnonzero(pc.equal(batch["part"], part))
            indices[written[part] : written[part] + len(found)] = found
            written[part] += len(found)
        start += len(batch)
    assert written == sizes
    for part in (CONFIDENT, UNCONFIDENT):
        indices = lists[part]
        order = np.argsort(num_response_tokens[indices], kind="stable")
        by_length = _new_list(folder / f"{part}_by_length.npy", len(order))
        for begin in range(0, len(order), ROWS_PER_GROUP):
            by_length[begin : begin + ROWS_PER_GROUP] = indices[
                order[begin : begin + ROWS_PER_GROUP]
            ]


def _new_list(path: Path, size: int) -> NDArray[np.int64]:
    """Returns a new list on disk. Its space is reserved, because a write to mapped memory on a full
    disk kills the process (SIGBUS)."""
    indices = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(size,))
    with accessing(path), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return indices


def open_matching(folder: Path, mixup: MixupConfig, seed: int, way: str | None = None) -> Matching:
    """Returns the matching over the lists in a split stage's folder. They are memory-mapped, so
    that a rank reads only what its steps need. way: None is `mixup.matching`.

    Within halves: both halves are dealt out in turn to two lists, and an example of one list gets a
    partner of its own half from the other. These lists are copied into memory.
    """
    way = way or mixup.matching
    suffix = "_by_length" if way == "length" else ""
    confident, unconfident, middle = (
        np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in (CONFIDENT + suffix, UNCONFIDENT + suffix, MIDDLE)
    )
    if way == "within_halves":
        half = min(len(confident), len(unconfident)) // 2
        halves = (confident[: 2 * half], unconfident[: 2 * half])
        left = [confident[2 * half :], unconfident[2 * half :], middle]
        first, second = (np.concatenate([part[n::2] for part in halves]) for n in (0, 1))
        # two blocks of equal size: the confident pairs, the unconfident pairs
        return Matching(first, second, np.concatenate(left), seed, mixup.alpha, max(1, half))
    block = mixup.length_block if way == "length" else None
    return Matching(confident, unconfident, middle, seed, mixup.alpha, block)


def mix_coverages(
    folder: Path, num_response_tokens: NDArray[np.integer[Any]], mixup: MixupConfig, seed: int
) -> dict[str, float]:
    """Returns, for random matching and for matching by length, the share of response tokens that
    take part in a mix in the first epoch."""
    found = {}
    for way in ("random", "length"):
        matching = open_matching(folder, mixup, seed, way)
        drawn = matching.units(0, 0, min(COVERAGE_UNITS, matching.num_units))
        found[way] = mix_coverage(drawn, num_response_tokens)
    return found
