"""The score tables as an artifact: what is written, what is read, how they are fitted to data."""

import dataclasses
import json
import math
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import COUNTS, FINGERPRINTS, IDS, METADATA, NAN, SUMS, rows_of, table

import sftmix.confidence.table as score_table
from sftmix.confidence import table_files
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table import fit_scores, read_scores, write_scores
from sftmix.errors import ArtifactError


def test_the_tables_hold_what_a_loop_over_single_examples_gives(tmp_path):
    folder = table(tmp_path / "t")
    expected = [
        {
            "example_id": i,
            "checkpoint": step,
            "nll_sum": SUMS[step][n],
            "num_response_tokens": COUNTS[n],
        }
        for step in (10, 20)
        for n, i in enumerate(IDS)
    ]
    found = rows_of(folder / "perplexity.parquet")
    assert [{k: v for k, v in row.items() if k != "perplexity"} for row in found] == expected
    assert [r["perplexity"] for r in found] == pytest.approx(
        [math.exp(r["nll_sum"] / r["num_response_tokens"]) for r in expected]
    )
    values = {i: [math.exp(SUMS[step][n] / COUNTS[n]) for step in SUMS] for n, i in enumerate(IDS)}
    by_hand = sorted(IDS, key=lambda i: (statistics.fmean(values[i]), i))
    for row, i in zip(rows_of(folder / "confidence.parquet"), IDS, strict=True):
        assert row == {
            "example_id": i,
            "confidence": pytest.approx(-statistics.fmean(values[i])),
            "variability": pytest.approx(statistics.pstdev(values[i])),
            "minimum": pytest.approx(min(values[i])),
            "maximum": pytest.approx(max(values[i])),
            "rank": by_hand.index(i) + 1,
        }
    assert by_hand.index("a") + 1 == by_hand.index("b")  # the tie is there
    assert not (folder / "not_finite.jsonl").exists()


def test_both_files_say_how_they_were_made(tmp_path):
    folder = table(tmp_path / "t")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert json.loads(pq.read_schema(folder / name).metadata[b"sftmix"]) == {
            **dataclasses.asdict(METADATA),
            "format": 1,
        }
        assert ScoreMetadata.of_file(folder / name) == METADATA


def test_row_groups_are_bounded_and_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ids = [f"{n:03d}" for n in rng.permutation(50)]
    given = {
        "ids": ids,
        "counts": rng.integers(1, 5, 50),
        "sums": {step: rng.uniform(0, 9, 50) for step in (3, 1, 2)},
    }
    whole = table(tmp_path / "whole", **given)
    for module in (score_table, table_files):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", 8)
    cut = table(tmp_path / "cut", **given)
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(whole / name).equals(pq.read_table(cut / name), check_metadata=True)
        file = pq.ParquetFile(cut / name)
        assert all(file.metadata.row_group(n).num_rows <= 8 for n in range(file.num_row_groups))
    file = pq.ParquetFile(cut / "perplexity.parquet")  # a checkpoint can be read alone
    assert all(
        len(set(file.read_row_group(n)["checkpoint"].to_pylist())) == 1
        for n in range(file.num_row_groups)
    )


def test_what_is_not_finite_is_named_and_has_no_rank(tmp_path):
    (tmp_path / "t").mkdir()
    sums = {10: np.array([1.0, 1e6, NAN, 709.7]), 20: np.array([1.0, 1.0, 1e6, 709.7])}
    summary = write_scores(
        tmp_path / "t",
        METADATA,
        example_ids=IDS,
        num_response_tokens=np.ones(4, dtype=int),
        nll_sum=sums,
    )
    lines = [
        json.loads(line) for line in (tmp_path / "t" / "not_finite.jsonl").read_text().splitlines()
    ]
    assert lines == [
        {"example_id": "a", "checkpoint": 10, "perplexity": "inf"},
        {"example_id": "d", "checkpoint": 10, "perplexity": "nan"},
        {"example_id": "d", "checkpoint": 20, "perplexity": "inf"},
        # finite at each checkpoint; their sum is not
        {"example_id": "c", "checkpoint": None, "perplexity": "inf"},
    ]
    assert [row["rank"] for row in rows_of(tmp_path / "t" / "confidence.parquet")] == [
        1,
        None,
        None,
        None,
    ]
    assert (
        summary.num_not_finite == 3
        and summary.not_finite == ["a", "d", "c"]
        and summary.mean_confidence == pytest.approx(-math.e)
    )
    assert "3 have no finite confidence" in summary.lines()[1]


def test_a_summary_names_twenty_and_the_file_all(tmp_path):
    (tmp_path / "t").mkdir()
    ids, sums = [f"{n:02d}" for n in range(25)], {10: np.full(25, NAN), 20: np.zeros(25)}
    summary = write_scores(
        tmp_path / "t",
        METADATA,
        example_ids=ids,
        num_response_tokens=np.ones(25, dtype=int),
        nll_sum=sums,
    )
    assert (
        summary.num_not_finite == 25
        and summary.not_finite == ids[:20]
        and np.isnan(summary.mean_confidence)
    )
    assert len((tmp_path / "t" / "not_finite.jsonl").read_text().splitlines()) == 25


@pytest.mark.parametrize("from_file", [False, True])
def test_rows_come_in_the_order_of_the_data(tmp_path, from_file):
    folder = table(tmp_path / "t")
    found = read_scores(folder / "confidence.parquet" if from_file else folder)
    rows = fit_scores(found, ["a", "b", "c", "d"], FINGERPRINTS)
    assert rows.tolist() == [1, 0, 3, 2] and rows.dtype == np.int64
    taken = found.confidence.take(pa.array(rows))
    assert (
        taken["example_id"].to_pylist() == ["a", "b", "c", "d"]
        and b"sftmix" in taken.schema.metadata
    )
    assert found.confidence.equals(pq.read_table(folder / "confidence.parquet"))
    assert found.values[rows].tolist() == taken["confidence"].to_pylist()


def test_each_difference_is_named_with_both_values_and_the_remedy(tmp_path):
    found = read_scores(table(tmp_path / "t"))
    other = {**FINGERPRINTS, "tokenizer": "u", "max_length": 128, "data": "elsewhere"}
    with pytest.raises(ArtifactError) as refused:
        fit_scores(found, IDS, other, allow_differences=["template"])
    said = str(refused.value)
    assert (
        "tokenizer is 't' in the table, 'u' for the data" in said
        and "max_length is 64 in the table, 128 for the data" in said
    )
    assert (
        "confidence.allow_differences=[template,max_length,tokenizer]" in said
        and "elsewhere" not in said
        and "dtype is" not in said
    )
    with pytest.raises(ArtifactError, match="max_length is 64 in the table, 128") as refused:
        fit_scores(found, IDS, other, allow_differences=["tokenizer"])
    assert "tokenizer is" not in str(refused.value)
    assert len(fit_scores(found, IDS, other, allow_differences=["tokenizer", "max_length"])) == 4


# a fingerprint on one side only
@pytest.mark.parametrize("changed", [{"dtype": None}, {"packing": "new"}])
def test_a_fingerprint_that_one_side_lacks_is_a_difference(changed, tmp_path):
    other = {key: value for key, value in {**FINGERPRINTS, **changed}.items() if value is not None}
    with pytest.raises(ArtifactError, match="None"):
        fit_scores(read_scores(table(tmp_path / "t")), IDS, other)


@pytest.mark.parametrize(
    ("wanted", "message", "reported"),
    [
        (
            ["a", "b", "c", "d", "e"],
            r"1 example has no score \(first 'e'\), 0 scores have no example \(none\)",
            {"e": "missing"},
        ),
        (
            ["a", "b"],
            r"0 examples have no score \(none\), 2 scores have no example \(first 'd', 'c'\)",
            {"d": "surplus", "c": "surplus"},
        ),
        (
            ["x", "b", "c", "d"],
            r"1 example has .* 'x'\), 1 score has .* 'a'\)",
            {"x": "missing", "a": "surplus"},
        ),
    ],
)
def test_missing_and_surplus_ids_are_counted_named_and_listed(wanted, message, reported, tmp_path):
    report = tmp_path / "new" / "report.jsonl"
    with pytest.raises(ArtifactError, match=message) as refused:
        fit_scores(read_scores(table(tmp_path / "t")), wanted, FINGERPRINTS, report_to=report)
    assert f"all of them are in {report}" in str(refused.value)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {line["example_id"]: line["problem"] for line in lines} == reported and len(
        lines
    ) == len(reported)
    fit_scores(read_scores(tmp_path / "t"), IDS, FINGERPRINTS, report_to=report)
    assert not report.exists()  # a report that no longer holds is not left behind


def test_a_message_names_twenty_ids_and_the_report_all(tmp_path):
    wanted = [*IDS, *(f"new-{n:02d}" for n in range(30))]
    with pytest.raises(ArtifactError, match="30 examples") as refused:
        fit_scores(
            read_scores(table(tmp_path / "t")),
            wanted,
            FINGERPRINTS,
            report_to=tmp_path / "report.jsonl",
        )
    assert "'new-19'" in str(refused.value) and "'new-20'" not in str(refused.value)
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 30


def test_confidences_that_are_not_finite_are_refused_by_id_unless_allowed(tmp_path):
    folder = table(tmp_path / "t", sums={10: np.array([1.0, 1e6, 1.0, NAN])})
    with pytest.raises(
        ArtifactError,
        match=(
            r"of 2 examples is infinite, NaN or null \(first 'c', 'a'\); all of them are in"
            r" .*r.jsonl"
        ),
    ):
        fit_scores(
            read_scores(folder),
            sorted(IDS, reverse=True),
            FINGERPRINTS,
            report_to=tmp_path / "r.jsonl",
        )
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[1] == {"example_id": "a", "confidence": "-inf", "problem": "not finite"}
    assert len(fit_scores(read_scores(folder), IDS, FINGERPRINTS, allow_not_finite=True)) == 4


def test_only_the_columns_that_are_asked_for_are_read(tmp_path, monkeypatch):
    asked = []
    read_column = score_table.read_column
    monkeypatch.setattr(
        score_table,
        "read_column",
        lambda path, name, kind: asked.append(name) or read_column(path, name, kind),
    )
    found = read_scores(table(tmp_path / "t"))
    assert asked == []
    fit_scores(found, IDS, FINGERPRINTS)
    assert sorted(asked) == ["confidence", "example_id"]
