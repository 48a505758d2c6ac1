"""The split on files against a plain sort in memory."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matchings import split_by_confidence

from sftmix.pairing import split
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT
from sftmix.pairing.split import NotFiniteError, split_table


def write(path, values, strata=None, seed=0):
    """Writes a table of several row groups, ids in no order; returns the ids."""
    rng = np.random.default_rng(seed)
    ids = [f"{n:08x}" for n in rng.permutation(len(values) * 7)[: len(values)]]
    columns = {"example_id": ids, "confidence": values}
    if strata is not None:
        columns["stratum"] = strata
    pq.write_table(pa.table(columns), path, row_group_size=max(1, len(values) // 5))
    return ids


def parts_of(path):
    table = pq.read_table(path).to_pydict()
    return table["example_id"], table["part"]


VALUES = {
    "distinct": lambda rng, n: rng.normal(size=n),
    "many equal": lambda rng, n: rng.integers(0, 4, n).astype(float),
    "all equal": lambda rng, n: np.full(n, -1.5),
    "both zeros": lambda rng, n: rng.choice([0.0, -0.0], n),
    "tiny steps": lambda rng, n: (
        np.nextafter(1.0, 2.0) * np.ones(n) + 2.0**-52 * rng.integers(0, 3, n)
    ),
    "whole numbers": lambda rng, n: rng.integers(-3, 3, n) + 2**53,
}


@pytest.fixture(params=[10**6, 40], ids=["no sample", "sampled"])
def sample_rows(request, monkeypatch):
    monkeypatch.setattr(split, "SAMPLE_ROWS", request.param)


@pytest.mark.parametrize(
    "shares", [(0.5, 0.5), (1 / 3, 1 / 3), (0.25, 0.6), (0.0, 0.4), (1.0, 0.0)]
)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("count", [2, 3, 1001])
def test_equals_a_sort_in_memory(tmp_path, sample_rows, count, values, shares):
    numbers = VALUES[values](np.random.default_rng(1), count)
    ids = write(tmp_path / "in.parquet", numbers)
    sizes = split_table(
        [tmp_path / "in.parquet"],
        tmp_path / "out.parquet",
        confident_share=shares[0],
        unconfident_share=shares[1],
    )
    expected = split_by_confidence(
        ids, np.asarray(numbers), confident_share=shares[0], unconfident_share=shares[1]
    )
    assert parts_of(tmp_path / "out.parquet") == (ids, expected)
    assert sizes == {part: expected.count(part) for part in (CONFIDENT, MIDDLE, UNCONFIDENT)}


def test_shares_are_taken_within_each_stratum(tmp_path, sample_rows):
    rng = np.random.default_rng(2)
    strata = rng.choice(["maths", "it's", ""], 1000, p=[0.7, 0.2, 0.1]).tolist()
    numbers = rng.integers(0, 9, 1000) + np.where(np.array(strata) == "maths", 100.0, 0.0)
    ids = write(tmp_path / "in.parquet", numbers, strata)
    split_table([tmp_path / "in.parquet"], tmp_path / "out.parquet", stratum="stratum")
    got = dict(zip(*parts_of(tmp_path / "out.parquet"), strict=True))
    for stratum in set(strata):
        rows = [n for n in range(1000) if strata[n] == stratum]
        assert [got[ids[n]] for n in rows] == split_by_confidence(
            [ids[n] for n in rows], numbers[rows]
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_id(tmp_path, bad):
    ids = write(tmp_path / "in.parquet", np.array([0.0, 1.0, bad, 2.0, bad]))
    with pytest.raises(
        NotFiniteError, match=f"2 examples is missing or not finite; first: {ids[2]}, {ids[4]}"
    ):
        split_table([tmp_path / "in.parquet"], tmp_path / "out.parquet")


def test_an_id_that_occurs_twice_at_a_cut_is_refused(tmp_path):
    pq.write_table(
        pa.table({"example_id": ["a", "b", "b", "c"], "confidence": [1.0] * 4}),
        tmp_path / "in.parquet",
    )
    with pytest.raises(ValueError, match="example_id 'b' occurs 2 times"):
        split_table([tmp_path / "in.parquet"], tmp_path / "out.parquet")


def test_shares_beyond_the_whole_are_refused(tmp_path):
    write(tmp_path / "in.parquet", np.arange(4.0))
    with pytest.raises(ValueError, match="more than the whole"):
        split_table([tmp_path / "in.parquet"], tmp_path / "out.parquet", confident_share=0.7)
