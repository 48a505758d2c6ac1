"""Split a table of scores into confident, middle and unconfident rows, exactly, in bounded memory.
Polars.

Rows are ordered from best to worst: by value descending, ties by example_id ascending (byte order).
Of n rows (of a stratum) the first floor(confident_share * n) are confident, the last
floor(unconfident_share * n) unconfident, the rest in the middle.

No sort of the table is needed. Each of the two cuts is one row, found by `_select`: a sample
brackets it, one scan counts the rows below the bracket and groups those inside, and the count
proves that the answer is exact or requires a wider bracket. The row is found by value first, and by
id only if a cut falls among equal values. One last scan writes the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from sftmix.errors import counted
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT

SAMPLE_ROWS = 500_000
_ID, _VALUE, _STRATUM, _KEY = pl.col("id"), pl.col("value"), pl.col("stratum"), pl.col("key")


class NotFiniteError(ValueError):
    """Values that cannot be ranked."""


@dataclass(frozen=True)
class _Found:
    """The key of the wanted rank, how many keys are smaller, and how many are equal to it."""

    key: Any
    smaller: int
    equal: int


@dataclass(frozen=True)
class _Cut:
    """Where the first rows of a stratum end: all with a larger value, and of those with this value
    the ids up to `id` (None: all)."""

    value: Any
    id: str | None


def split_table(
    sources: Sequence[Path],
    target: Path,
    *,
    value: str = "confidence",
    highest_first: bool = True,
    confident_share: float = 0.5,
    unconfident_share: float = 0.5,
    stratum: str | None = None,
) -> dict[str, int]:
    """Writes example_id and part for every row of the Parquet `sources`, in their order; returns
    the sizes of the parts.

    value: a numeric column; without `highest_first` the lowest values are confident. stratum: a
    column; the shares apply within each of its values. Raises NotFiniteError for NaN, infinite or
    missing values, and ValueError for invalid shares, columns or ids.
    """
    rows = pl.scan_parquet([str(path) for path in sources], glob=False).select(
        pl.col("example_id").alias("id"),
        pl.col(value).alias("value"),
        (pl.col(stratum) if stratum else pl.lit(0)).alias("stratum"),
    )
    written, sizes = _assign(
        rows,
        value,
        (confident_share, unconfident_share),
        highest_first,
        is_stratified=stratum is not None,
    )
    written.sink_parquet(target, compression="zstd", compression_level=1, engine="streaming")
    return sizes


def split_values(
    example_ids: Sequence[str] | pa.ChunkedArray,
    values: NDArray[Any],
    *,
    highest_first: bool = True,
    confident_share: float = 0.5,
    unconfident_share: float = 0.5,
    strata: Sequence[Any] | pa.ChunkedArray | None = None,
) -> list[str]:
    """Returns the part of every example, in memory: the same as `split_table` of a table with these
    columns. Raises the same errors."""
    columns = {
        "id": example_ids,
        "value": values,
        "stratum": [0] * len(values) if strata is None else strata,
    }
    rows = pl.DataFrame({name: pl.Series(column) for name, column in columns.items()}).lazy()
    written, _ = _assign(
        rows,
        "value",
        (confident_share, unconfident_share),
        highest_first,
        is_stratified=strata is not None,
    )
    return written.collect()["part"].to_list()


def _assign(
    rows: pl.LazyFrame,
    column: str,
    shares: tuple[float, float],
    highest_first: bool,
    *,
    is_stratified: bool,
) -> tuple[pl.LazyFrame, dict[str, int]]:
    """Returns example_id and part of every row (id, value, stratum), and the sizes of the parts."""
    confident, unconfident = (exact_share(share) for share in shares)
    if confident + unconfident > 1:
        raise ValueError(
            f"confident_share {shares[0]} and unconfident_share {shares[1]} are more than the whole"
        )
    if not highest_first:
        # the bits of a whole number turned: -1 - value, and without a sign the largest - value
        is_whole = rows.collect_schema()["value"].is_integer()
        rows = rows.with_columns((_VALUE.not_() if is_whole else -_VALUE).alias("value"))
    totals = _check(rows, column, is_stratified)
    first = {key: math.floor(confident * total) for key, total in totals.items()}
    second = {key: total - math.floor(unconfident * total) for key, total in totals.items()}
    first_cuts = _find_cuts(rows, totals, first)
    second_cuts = first_cuts if first == second else _find_cuts(rows, totals, second)
    part = (
        pl.when(_is_before(first_cuts, totals, first))
        .then(pl.lit(CONFIDENT))
        .when(_is_before(second_cuts, totals, second))
        .then(pl.lit(MIDDLE))
        .otherwise(pl.lit(UNCONFIDENT))
    )
    return rows.select(_ID.alias("example_id"), part.alias("part")), {
        CONFIDENT: sum(first.values()),
        MIDDLE: sum(second.values()) - sum(first.values()),
        UNCONFIDENT: sum(totals.values()) - sum(second.values()),
    }


def exact_share(share: float) -> Fraction:
    """Returns the intended fraction: 0.1 is 1/10, and 0.3333333333333333 is 1/3."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share is between 0 and 1, not {share}")
    return Fraction(share).limit_denominator(1_000_000)


def _collect(query: pl.LazyFrame) -> pl.DataFrame:
    return query.collect(engine="streaming")


def _check(rows: pl.LazyFrame, column: str, stratified: bool) -> dict[Any, int]:
    schema = rows.collect_schema()
    if not (schema["value"].is_float() or schema["value"].is_integer()):
        raise ValueError(f"{column} is {schema['value']}, and only numbers can be ranked")
    bad = (
        _VALUE.is_finite().not_().fill_null(True)
        if schema["value"].is_float()
        else _VALUE.is_null()
    )
    sums = [pl.len().alias("count"), bad.sum().alias("bad")]
    # A group_by over one constant group keeps what it has read, several GB; a plain select does
    # not.
    counts = _collect(
        rows.group_by("stratum").agg(sums)
        if stratified
        else rows.select(pl.lit(0).alias("stratum"), *sums)
    )
    if count := int(counts["bad"].sum()):
        first = map(str, _collect(rows.filter(bad).select("id").head(20))["id"])
        raise NotFiniteError(
            f"{column} of {counted(count, 'example')} is missing or not finite; first:"
            f" {', '.join(first)}"
        )
    return dict(counts.sort("stratum").select("stratum", "count").iter_rows())


def _is_before(cuts: dict[Any, _Cut], totals: dict[Any, int], before: dict[Any, int]) -> pl.Expr:
    """Returns whether a row is one of the `before` first of its stratum."""

    def of(cut: _Cut | None, everything: bool) -> pl.Expr:
        if cut is None:
            return pl.lit(everything)
        tie = pl.lit(True) if cut.id is None else pl.lit(cut.id) >= _ID
        return (cut.value < _VALUE) | ((cut.value == _VALUE) & tie)

    exprs = {key: of(cuts.get(key), before[key] > 0) for key in totals}
    if len(exprs) == 1:
        return next(iter(exprs.values()))
    chain: Any = pl
    for key, expr in exprs.items():
        chain = chain.when(_STRATUM.eq_missing(pl.lit(key))).then(expr)
    return chain.otherwise(pl.lit(False))


def _in_stratum(key: Any, totals: dict[Any, int]) -> pl.Expr:
    """Returns whether a row is in a stratum; always true if there is only one."""
    return _STRATUM.eq_missing(pl.lit(key)) if len(totals) > 1 else pl.lit(True)


def _find_cuts(
    rows: pl.LazyFrame, totals: dict[Any, int], before: dict[Any, int]
) -> dict[Any, _Cut]:
    wanted = {
        key: totals[key] - count + 1 for key, count in before.items() if 0 < count < totals[key]
    }  # rank from the smallest value
    values = _select(rows.select("stratum", _VALUE.alias("key")), wanted, totals)
    # and that many of the ties
    ties = {key: before[key] - (totals[key] - at.smaller - at.equal) for key, at in values.items()}
    ties = {key: count for key, count in ties.items() if count < values[key].equal}
    tied = rows
    if ties:
        runs = [_in_stratum(key, totals) & _VALUE.eq(values[key].key) for key in ties]
        tied = rows.filter(pl.any_horizontal(runs)).select("stratum", _ID.alias("key"))
    ids = _select(tied, ties, {key: values[key].equal for key in ties})
    for at in ids.values():
        if at.equal > 1:
            raise ValueError(f"example_id {at.key!r} occurs {at.equal} times")
    return {key: _Cut(at.key, ids[key].key if key in ids else None) for key, at in values.items()}


def _select(
    relation: pl.LazyFrame, ranks: dict[Any, int], totals: dict[Any, int]
) -> dict[Any, _Found]:
    """Returns the key of the given rank (1 is the smallest) of every stratum of a (stratum, key)
    relation."""
    if not ranks:
        return {}
    every = sum(totals[key] for key in ranks) // SAMPLE_ROWS
    sample: dict[Any, list[Any]] = {}
    if every > 1:
        # A slice of a text column keeps all text that was read with it (gigabytes here) unless it
        # is copied.
        copied = (
            pl.concat_str(_KEY, pl.lit("")).alias("key")
            if relation.collect_schema()["key"] == pl.String
            else _KEY
        )
        drawn = _collect(
            relation.with_row_index()
            .filter(pl.col("index").hash(1) % every == 0)
            .select("stratum", copied)
        )
        for (stratum,), part in drawn.group_by("stratum"):
            sample[stratum] = part["key"].sort().to_list()
    found: dict[Any, _Found] = {}
    spread = 5.0
    while len(found) < len(ranks):
        conditions, inside = [], pl.lit(None)
        for stratum in ranks.keys() - found.keys():
            low, high = _bracket(sample.get(stratum, []), ranks[stratum] / totals[stratum], spread)
            is_stratum = _in_stratum(stratum, totals)
            conditions.append(
                is_stratum & (pl.lit(high) >= _KEY) if high is not None else is_stratum
            )
            inside = (
                pl.when(is_stratum & (pl.lit(low) <= _KEY) if low is not None else is_stratum)
                .then(_KEY)
                .otherwise(inside)
            )
        groups = _collect(
            relation.filter(pl.any_horizontal(conditions) if len(conditions) > 1 else conditions[0])
            .group_by("stratum", inside.alias("inside"))
            .agg(pl.len().alias("count"))
        ).sort("inside", nulls_last=False)
        for (stratum,), part in groups.group_by("stratum", maintain_order=True):
            passed = part["count"].cast(pl.Int64).cum_sum()
            at = passed.search_sorted(ranks[stratum], "left") if stratum in ranks else len(part)
            if stratum not in found and at < len(part) and part["inside"][at] is not None:
                count = int(part["count"][at])
                found[stratum] = _Found(part["inside"][at], int(passed[at]) - count, count)
        spread *= 8
    return found


def _bracket(keys: list[Any], share: float, spread: float) -> tuple[Any, Any]:
    """Returns keys that bracket the wanted one with high probability; None for no bound."""
    middle = share * len(keys)
    margin = spread * (1 + math.sqrt(len(keys) * share * (1 - share)))
    low, high = math.floor(middle - margin), math.ceil(middle + margin)
    return (keys[low] if low >= 0 and keys else None), (keys[high] if high < len(keys) else None)
