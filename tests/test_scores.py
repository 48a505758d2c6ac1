"""The score tables as an artifact: what is in them, who can open them, what is refused."""

import dataclasses
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from sftmix import artifacts, score_files, scores
from sftmix.cli import main
from sftmix.errors import ArtifactError, ConfigError
from sftmix.score_commands import export_scores, show_scores
from sftmix.score_merge import merge_scores
from sftmix.scores import ScoreMetadata, fit_scores, read_scores, write_scores

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
FINGERPRINTS = {"tokenizer": "t", "template": "p", "mask_policy": "m", "max_length": 64, "dtype": "bf16", "data": "d"}
METADATA = ScoreMetadata(
    "checkpoints", [{"path": "owner/small", "revision": "abc"}], [10, 20], FINGERPRINTS, ["rows.jsonl"], {"torch": "2"}, "c"
)
IDS = ["b", "a", "d", "c"]
COUNTS = np.array([1, 2, 4, 3])
SUMS = {20: np.array([2.0, 4.0, 1.0, 6.0]), 10: np.array([1.0, 2.0, 9.0, 0.5])}  # b and a are tied


def table(folder, *, ids=IDS, counts=COUNTS, sums=SUMS, **changes):
    """Writes a table; fields of METADATA may be replaced. Returns its folder."""
    folder.mkdir(parents=True)
    metadata = dataclasses.replace(METADATA, **{"checkpoints": sorted(sums), **changes})
    write_scores(folder, metadata, example_ids=ids, num_response_tokens=np.asarray(counts), nll_sum=sums)
    return folder


def own_table(path, **columns):
    """Writes a table as a user would who knows nothing of sftmix."""
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], **columns}), path)
    return path


def rows_of(path):
    return pq.read_table(path).to_pylist()


# What is written


def test_the_tables_hold_what_a_loop_over_single_examples_gives(tmp_path):
    folder = table(tmp_path / "t")
    expected = [
        {"example_id": i, "checkpoint": step, "nll_sum": SUMS[step][n], "num_response_tokens": COUNTS[n]}
        for step in (10, 20)
        for n, i in enumerate(IDS)
    ]
    found = rows_of(folder / "perplexity.parquet")
    assert [{k: v for k, v in row.items() if k != "perplexity"} for row in found] == expected
    assert [r["perplexity"] for r in found] == pytest.approx([math.exp(r["nll_sum"] / r["num_response_tokens"]) for r in expected])
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
        assert json.loads(pq.read_schema(folder / name).metadata[b"sftmix"]) == {**dataclasses.asdict(METADATA), "format": 1}
        assert ScoreMetadata.of_file(folder / name) == METADATA


def test_row_groups_are_bounded_and_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ids = [f"{n:03d}" for n in rng.permutation(50)]
    given = {"ids": ids, "counts": rng.integers(1, 5, 50), "sums": {step: rng.uniform(0, 9, 50) for step in (3, 1, 2)}}
    whole = table(tmp_path / "whole", **given)
    for module in (scores, score_files):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", 8)
    cut = table(tmp_path / "cut", **given)
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(whole / name).equals(pq.read_table(cut / name), check_metadata=True)
        file = pq.ParquetFile(cut / name)
        assert all(file.metadata.row_group(n).num_rows <= 8 for n in range(file.num_row_groups))
    file = pq.ParquetFile(cut / "perplexity.parquet")  # a checkpoint can be read alone
    assert all(len(set(file.read_row_group(n)["checkpoint"].to_pylist())) == 1 for n in range(file.num_row_groups))


def test_what_is_not_finite_is_named_and_has_no_rank(tmp_path):
    (tmp_path / "t").mkdir()
    sums = {10: np.array([1.0, 1e6, NAN, 709.7]), 20: np.array([1.0, 1.0, 1e6, 709.7])}
    summary = write_scores(tmp_path / "t", METADATA, example_ids=IDS, num_response_tokens=np.ones(4, dtype=int), nll_sum=sums)
    lines = [json.loads(line) for line in (tmp_path / "t" / "not_finite.jsonl").read_text().splitlines()]
    assert lines == [
        {"example_id": "a", "checkpoint": 10, "perplexity": "inf"},
        {"example_id": "d", "checkpoint": 10, "perplexity": "nan"},
        {"example_id": "d", "checkpoint": 20, "perplexity": "inf"},
        {"example_id": "c", "checkpoint": None, "perplexity": "inf"},  # finite at each checkpoint; their sum is not
    ]
    assert [row["rank"] for row in rows_of(tmp_path / "t" / "confidence.parquet")] == [1, None, None, None]
    assert summary.num_not_finite == 3 and summary.not_finite == ["a", "d", "c"] and summary.mean_confidence == pytest.approx(-math.e)
    assert "3 have no finite confidence" in summary.lines()[1]


def test_a_summary_names_twenty_and_the_file_all(tmp_path):
    (tmp_path / "t").mkdir()
    ids, sums = [f"{n:02d}" for n in range(25)], {10: np.full(25, NAN), 20: np.zeros(25)}
    summary = write_scores(tmp_path / "t", METADATA, example_ids=ids, num_response_tokens=np.ones(25, dtype=int), nll_sum=sums)
    assert summary.num_not_finite == 25 and summary.not_finite == ids[:20] and np.isnan(summary.mean_confidence)
    assert len((tmp_path / "t" / "not_finite.jsonl").read_text().splitlines()) == 25


# Who can open it

NAMES = ("confidence", "perplexity")


def expected_columns(folder, name):
    return {key: [None if v != v else v for v in values] for key, values in pq.read_table(folder / f"{name}.parquet").to_pydict().items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    table(folder / "t", sums={**SUMS, 30: np.array([NAN, 1e6, 1.0, 2.0])})
    return export_scores(str(folder / "t"), folder / "hub")


def without_nan(columns):
    return {key: [None if v is None or v != v else v for v in values] for key, values in columns.items()}


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_pandas(name, exported):
    import pandas

    assert without_nan(pandas.read_parquet(exported / f"{name}.parquet").to_dict("list")) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_polars(name, exported):
    import polars

    assert without_nan(polars.read_parquet(exported / f"{name}.parquet").to_dict(as_series=False)) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_duckdb(name, exported):
    import duckdb

    with duckdb.connect() as connection:
        found = connection.execute("select * from read_parquet(?)", [str(exported / f"{name}.parquet")])
        columns = [column[0] for column in found.description]
        rows = found.fetchall()
    assert without_nan(dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_opens_in_datasets_under_the_names_of_its_card(name, exported, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(exported), name, split="train", cache_dir=str(tmp_path))
    assert without_nan(loaded.to_dict()) == expected_columns(exported, name)


# Reading, and fitting to data


@pytest.mark.parametrize("from_file", [False, True])
def test_rows_come_in_the_order_of_the_data(tmp_path, from_file):
    folder = table(tmp_path / "t")
    found = read_scores(folder / "confidence.parquet" if from_file else folder)
    rows = fit_scores(found, ["a", "b", "c", "d"], FINGERPRINTS)
    assert rows.tolist() == [1, 0, 3, 2] and rows.dtype == np.int64
    taken = found.confidence.take(pa.array(rows))
    assert taken["example_id"].to_pylist() == ["a", "b", "c", "d"] and b"sftmix" in taken.schema.metadata
    assert found.confidence.equals(pq.read_table(folder / "confidence.parquet"))
    assert found.values[rows].tolist() == taken["confidence"].to_pylist()


def test_each_difference_is_named_with_both_values_and_the_remedy(tmp_path):
    found = read_scores(table(tmp_path / "t"))
    other = {**FINGERPRINTS, "tokenizer": "u", "max_length": 128, "data": "elsewhere"}
    with pytest.raises(ArtifactError) as refused:
        fit_scores(found, IDS, other, allow_differences=["template"])
    said = str(refused.value)
    assert "tokenizer is 't' in the table, 'u' for the data" in said and "max_length is 64 in the table, 128 for the data" in said
    assert "confidence.allow_differences=[template,max_length,tokenizer]" in said and "elsewhere" not in said and "dtype is" not in said
    with pytest.raises(ArtifactError, match="max_length is 64 in the table, 128") as refused:
        fit_scores(found, IDS, other, allow_differences=["tokenizer"])
    assert "tokenizer is" not in str(refused.value)
    assert len(fit_scores(found, IDS, other, allow_differences=["tokenizer", "max_length"])) == 4


@pytest.mark.parametrize("changed", [{"dtype": None}, {"packing": "new"}])  # a fingerprint on one side only
def test_a_fingerprint_that_one_side_lacks_is_a_difference(changed, tmp_path):
    other = {key: value for key, value in {**FINGERPRINTS, **changed}.items() if value is not None}
    with pytest.raises(ArtifactError, match="None"):
        fit_scores(read_scores(table(tmp_path / "t")), IDS, other)


@pytest.mark.parametrize(
    ("wanted", "message", "reported"),
    [
        (["a", "b", "c", "d", "e"], r"1 examples have no score \(first 'e'\), 0 scores have no example \(none\)", {"e": "missing"}),
        (["a", "b"], r"0 examples have no score \(none\), 2 scores have no example \(first 'd', 'c'\)", {"d": "surplus", "c": "surplus"}),
        (["x", "b", "c", "d"], r"1 examples .* 'x'\), 1 scores .* 'a'\)", {"x": "missing", "a": "surplus"}),
    ],
)
def test_missing_and_surplus_ids_are_counted_named_and_listed(wanted, message, reported, tmp_path):
    report = tmp_path / "new" / "report.jsonl"
    with pytest.raises(ArtifactError, match=message) as refused:
        fit_scores(read_scores(table(tmp_path / "t")), wanted, FINGERPRINTS, report_to=report)
    assert f"all of them are in {report}" in str(refused.value)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert {line["example_id"]: line["problem"] for line in lines} == reported and len(lines) == len(reported)
    fit_scores(read_scores(tmp_path / "t"), IDS, FINGERPRINTS, report_to=report)
    assert not report.exists()  # a report that no longer holds is not left behind


def test_a_message_names_twenty_ids_and_the_report_all(tmp_path):
    wanted = [*IDS, *(f"new-{n:02d}" for n in range(30))]
    with pytest.raises(ArtifactError, match="30 examples") as refused:
        fit_scores(read_scores(table(tmp_path / "t")), wanted, FINGERPRINTS, report_to=tmp_path / "report.jsonl")
    assert "'new-19'" in str(refused.value) and "'new-20'" not in str(refused.value)
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 30


def test_confidences_that_are_not_finite_are_refused_by_id_unless_allowed(tmp_path):
    folder = table(tmp_path / "t", sums={10: np.array([1.0, 1e6, 1.0, NAN])})
    with pytest.raises(ArtifactError, match=r"of 2 examples is infinite, NaN or null \(first 'c', 'a'\); all of them are in .*r.jsonl"):
        fit_scores(read_scores(folder), sorted(IDS, reverse=True), FINGERPRINTS, report_to=tmp_path / "r.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert lines[1] == {"example_id": "a", "confidence": "-inf", "problem": "not finite"}
    assert len(fit_scores(read_scores(folder), IDS, FINGERPRINTS, allow_not_finite=True)) == 4


def test_only_the_columns_that_are_asked_for_are_read(tmp_path, monkeypatch):
    asked = []
    read_column = scores.read_column
    monkeypatch.setattr(scores, "read_column", lambda path, name, kind: asked.append(name) or read_column(path, name, kind))
    found = read_scores(table(tmp_path / "t"))
    assert asked == []
    fit_scores(found, IDS, FINGERPRINTS)
    assert sorted(asked) == ["confidence", "example_id"]


# Tables from elsewhere


def test_a_table_of_ones_own_needs_a_named_column_and_is_said_to_be_unchecked(tmp_path, capsys):
    path = own_table(tmp_path / "own.parquet", quality=[3, 1, 2], confidence=[1.0, 2.0, 3.0])
    with pytest.raises(ArtifactError, match=r"no sftmix metadata.*`confidence.scores_column=quality`"):
        read_scores(path)
    found = read_scores(path, column="quality")
    assert fit_scores(found, ["c", "a", "b"], FINGERPRINTS).tolist() == [2, 0, 1]
    assert "no sftmix metadata: only its ids are compared" in capsys.readouterr().out
    assert found.confidence.schema.names == ["example_id", "confidence", "variability", "minimum", "maximum", "rank"]
    assert found.confidence["confidence"].to_pylist() == [3.0, 1.0, 2.0] and found.confidence["rank"].to_pylist() == [1, 3, 2]
    assert found.confidence["variability"].null_count == 3
    assert read_scores(path, column="confidence").values.tolist() == [1.0, 2.0, 3.0]


def test_another_column_of_our_own_table_is_still_checked(tmp_path):
    found = read_scores(table(tmp_path / "t"), column="variability")
    with pytest.raises(ArtifactError, match="tokenizer is 't'"):
        fit_scores(found, IDS, {**FINGERPRINTS, "tokenizer": "u"})
    assert found.confidence["confidence"].equals(pq.read_table(tmp_path / "t" / "confidence.parquet")["variability"])
    assert found.confidence.schema.metadata is None  # what it says of `confidence` would not be true


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_ids_as_other_libraries_write_them_are_read(kind, tmp_path):
    pq.write_table(pa.table({"example_id": pa.array(["a", "b"]).cast(kind), "q": pa.array([1, None])}), tmp_path / "own.parquet")
    found = read_scores(tmp_path / "own.parquet", column="q")
    assert found.example_ids.to_pylist() == ["a", "b"] and found.values[0] == 1 and np.isnan(found.values[1])
    with pytest.raises(ArtifactError, match=r"the q of 1 examples is infinite, NaN or null \(first 'b'\)"):
        fit_scores(found, ["a", "b"], {})


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"q": [1, 2, 3]}, "quality", r"own.parquet: the column 'quality' is not there; it has example_id, q"),
        ({"q": ["x", "y", "z"]}, "q", r"the column 'q' holds string; expected numbers"),
        ({"q": [True, False, True]}, "q", r"the column 'q' holds bool; expected numbers"),
        ({"example_id": [1, 2, 3], "q": [1, 2, 3]}, "q", r"the column 'example_id' holds int64; expected text"),
        ({"example_id": ["a", "b", None], "q": [1, 2, 3]}, "q", r"1 rows have no example_id"),
        ({"example_id": ["a", "b", "a"], "q": [1, 2, 3]}, "q", r"1 ids stand in several rows \(first 'a'\)"),
    ],
)
def test_what_is_wrong_with_a_table_of_ones_own_is_said(columns, column, message, tmp_path):
    path = own_table(tmp_path / "own.parquet", **columns) if "example_id" not in columns else tmp_path / "own.parquet"
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], **columns}), path)
    with pytest.raises(ArtifactError, match=message):
        fit_scores(read_scores(path, column=column), ["a", "b", "c"], FINGERPRINTS)


def with_a_changed_byte(content, at):
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize("change", [lambda content: content[: len(content) // 2], lambda content: b"example_id,confidence\na,1\n"])
def test_a_file_that_is_cut_off_or_no_parquet_is_one_clear_error(change, tmp_path):
    path = table(tmp_path / "t") / "confidence.parquet"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ArtifactError, match=r"confidence.parquet: cannot be read as Parquet: .* Get the table again."):
        read_scores(tmp_path / "t")


def test_no_changed_byte_in_the_pages_changes_a_score_in_silence(tmp_path):
    path = table(tmp_path / "t") / "confidence.parquet"
    content, expected = path.read_bytes(), read_scores(tmp_path / "t").values.tolist()
    num_refused = 0
    for at in range(4, len(content) - int.from_bytes(content[-8:-4], "little") - 8):  # what is between magic and footer
        path.write_bytes(with_a_changed_byte(content, at))
        try:
            found = read_scores(tmp_path / "t")
            assert found.values.tolist() == expected and found.example_ids.to_pylist() == IDS, f"byte {at}"
        except ArtifactError as error:
            num_refused += "cannot be read as Parquet" in str(error)
    assert num_refused > 50  # the rest is in columns that are not read, or in statistics


def test_a_published_table_is_verified_before_it_is_read(tmp_path):
    with artifacts.publish(tmp_path / "t", stage="score", settings={}) as staging:
        write_scores(staging, METADATA, example_ids=IDS, num_response_tokens=COUNTS, nll_sum=SUMS)
    assert len(fit_scores(read_scores(tmp_path / "t"), IDS, FINGERPRINTS)) == 4
    path = tmp_path / "t" / "perplexity.parquet"
    path.write_bytes(with_a_changed_byte(path.read_bytes(), 60))
    with pytest.raises(ArtifactError, match=r"perplexity.parquet differs from what was written"):
        read_scores(tmp_path / "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b'{"format": 9}', r"the format of its sftmix metadata is 9; this version reads 1. Update sftmix"),
        (b"[1]", r"metadata is \[1\]"),
        (b'{"format": 1, "mode": "live"}', "checkpoints, commit, dataset, fingerprints, models, versions is missing"),
        (json.dumps({**dataclasses.asdict(METADATA), "models": "m"}).encode(), "models is missing, unknown, empty or of a wrong type"),
        (json.dumps({**dataclasses.asdict(METADATA), "checkpoints": ["x"]}).encode(), "checkpoints is missing"),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(content, message, tmp_path):
    rows = pq.read_table(table(tmp_path / "t") / "confidence.parquet")
    pq.write_table(rows.replace_schema_metadata({b"sftmix": content}), tmp_path / "t" / "confidence.parquet")
    with pytest.raises(ArtifactError, match=message):
        read_scores(tmp_path / "t")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("TMP/none", "none does not exist. Give a folder with confidence.parquet, a Parquet file, or a Hub name"),
        ("none.parquet", "none.parquet does not exist"),
        ("TMP", r"holds no confidence.parquet. Give a folder that `sftmix score`"),
        ("TMP/run", r"run holds no confidence.parquet. Give .*run/confidence"),
    ],
)
def test_a_table_that_is_not_there_is_named(source, message, tmp_path):
    table(tmp_path / "run" / "confidence")
    with pytest.raises(ArtifactError, match=message):
        read_scores(source.replace("TMP", str(tmp_path)))


def test_a_revision_of_a_local_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="revision 'v1' belongs to a table on the Hub"):
        read_scores(table(tmp_path / "t"), "v1")


# The Hub, which cannot be reached from here


def test_a_table_on_the_hub_is_downloaded_file_by_file(exported, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: asked.append((args, options)) or str(exported))
    found = read_scores("owner/scores", "v1")
    assert asked == [(("owner/scores",), {"repo_type": "dataset", "revision": "v1", "allow_patterns": ["confidence.parquet"]})]
    assert found.metadata is not None and found.metadata.mode == "checkpoints" and found.example_ids.to_pylist() == IDS
    assert found.perplexity_path == exported / "perplexity.parquet"
    assert asked[1][1]["allow_patterns"] == ["perplexity.parquet"] and asked[1][1]["revision"] == "v1"


def test_a_dataset_on_the_hub_without_a_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(ArtifactError, match="owner/other holds no confidence.parquet"):
        read_scores("owner/other")


@pytest.mark.parametrize("name", ["owner/none", "no name"])  # offline, and no name that the Hub could have
def test_a_name_that_the_hub_does_not_give_is_refused(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=f"{name} is no local folder, and the Hub does not give .*at revision v1.*Check the name"):
        read_scores(name, "v1")


# Merging

MORE = {"ids": ["f", "e"], "counts": [2, 5], "sums": {10: np.array([1.0, 2.0]), 20: np.array([3.0, 1.0])}}


def test_tables_of_disjoint_examples_are_joined_and_ranked_anew(tmp_path):
    other = {**FINGERPRINTS, "data": "another"}
    sources = [table(tmp_path / "a"), table(tmp_path / "b", **MORE, dataset=["more.jsonl"], fingerprints=other)]
    sums = {step: np.concatenate([SUMS[step], MORE["sums"][step]]) for step in (10, 20)}
    expected = table(tmp_path / "at-once", ids=[*IDS, *MORE["ids"]], counts=[*COUNTS, *MORE["counts"]], sums=sums)
    summary = merge_scores([str(source) for source in sources], tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(expected / name))
    metadata = read_scores(tmp_path / "merged").metadata
    assert summary.num_examples == 6 and metadata.dataset == ["rows.jsonl", "more.jsonl"] and metadata.checkpoints == [10, 20]
    assert metadata.fingerprints == {key: value for key, value in FINGERPRINTS.items() if key != "data"}
    manifest = artifacts.verify(tmp_path / "merged")
    assert manifest.stage == "scores merge" and set(manifest.inputs) == {str(source) for source in sources}


def test_more_checkpoints_of_the_same_examples_make_a_new_aggregate(tmp_path):
    rng = np.random.default_rng(2)
    sums = {step: rng.uniform(0, 9, 4) for step in (5, 10, 15, 20)}
    expected = table(tmp_path / "at-once", sums=sums)
    first = table(tmp_path / "a", sums={step: sums[step] for step in (20, 10)})
    order = [2, 0, 3, 1]  # the other table has another order of rows
    second = table(
        tmp_path / "b", ids=[IDS[n] for n in order], counts=COUNTS[order], sums={step: sums[step][order] for step in (5, 15)}, commit="d"
    )
    merge_scores([str(first), str(second)], tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(expected / name))
    metadata = read_scores(tmp_path / "merged").metadata
    assert metadata.checkpoints == [5, 10, 15, 20] and metadata.fingerprints == FINGERPRINTS and metadata.commit == "c, d"
    values = [[math.exp(sums[step][n] / COUNTS[n]) for step in sums] for n in range(4)]  # and by hand
    merged = read_scores(tmp_path / "merged")
    assert merged.values == pytest.approx([-statistics.fmean(found) for found in values])


def test_a_perplexity_table_that_was_sorted_otherwise_is_merged_by_id(tmp_path):
    sources = [str(table(tmp_path / "a")), str(table(tmp_path / "b", **MORE))]
    merge_scores(sources, tmp_path / "expected")
    path = tmp_path / "a" / "perplexity.parquet"
    pq.write_table(pq.read_table(path).sort_by("nll_sum"), path)
    merge_scores(sources, tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(tmp_path / "expected" / name))


def test_models_keep_their_numbers_when_merged(tmp_path):
    def given(number):
        return {"mode": "models", "models": [{"path": f"model-{number}"}], "sums": {number: SUMS[10] * number}}

    sources = [str(table(tmp_path / str(number), **given(number))) for number in (3, 1, 2)]
    merge_scores(sources, tmp_path / "merged")
    metadata = read_scores(tmp_path / "merged").metadata
    assert metadata.checkpoints == [1, 2, 3] and [m["path"] for m in metadata.models] == ["model-1", "model-2", "model-3"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "hold the same examples, and several of them the checkpoints 10, 20"),
        ({"sums": {20: SUMS[20], 30: SUMS[10]}}, "the checkpoints 20"),
        (
            {**MORE, "fingerprints": {**FINGERPRINTS, "tokenizer": "u"}},
            r"different examples .* fingerprints.tokenizer is 't' in .*, 'u' in",
        ),
        ({**MORE, "sums": {10: MORE["sums"][10]}}, r"different examples .* checkpoints is \[10, 20\] in .*, \[10\] in"),
        ({**MORE, "models": [{"path": "owner/large"}]}, "different examples .* models is"),
        ({**MORE, "mode": "live"}, "mode is 'checkpoints' in .*, 'live' in"),
        ({**MORE, "commit": "d"}, "commit is 'c' in .*, 'd' in"),
        ({"sums": {30: SUMS[10]}, "fingerprints": {**FINGERPRINTS, "max_length": 8}}, "same examples .* fingerprints.max_length is 64 in"),
        ({"sums": {30: SUMS[10]}, "mode": "online"}, "same examples .* mode is 'checkpoints' in .*, 'online' in"),
        ({"sums": {30: SUMS[10]}, "models": [{"path": "owner/large"}]}, "same examples .* models is"),
        ({"sums": {30: SUMS[10]}, "counts": [1, 2, 4, 9]}, r"1 examples have another number of response tokens .* \(first 'c'\)"),
        ({**MORE, "ids": ["f", "a"]}, r"\(4 examples\) and .* \(2\) share 1 \(first 'a'\)"),
        ({"ids": IDS[:2], "counts": COUNTS[:2], "sums": {30: SUMS[10][:2]}}, "share 2"),
    ],
)
def test_tables_that_make_no_sense_together_are_refused(other, message, tmp_path):
    sources = [str(table(tmp_path / "a")), str(table(tmp_path / "b", **other))]
    with pytest.raises(ArtifactError, match=message):
        merge_scores(sources, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_tables_of_both_kinds_are_merged_in_two_steps(tmp_path):
    sources = [table(tmp_path / "a"), table(tmp_path / "b", sums={30: SUMS[10]}), table(tmp_path / "c", **MORE)]
    with pytest.raises(ArtifactError, match="some share all examples and some none. Merge those that share all first"):
        merge_scores([str(source) for source in sources], tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.slice(1), "has 7 rows; 4 examples under 2 checkpoints are 8"),
        (lambda rows: pa.concat_tables([rows.slice(0, 7), rows.slice(0, 1)]), "checkpoint 10 has not one row for each example"),
        (lambda rows: rows.set_column(3, "num_response_tokens", [pa.array(range(1, 9))]), "differs between checkpoints"),
        (lambda rows: rows.set_column(3, "num_response_tokens", [pa.array([0] * 8)]), "is below 1"),
        (lambda rows: rows.drop_columns("nll_sum"), "the column 'nll_sum' is not there"),
        (lambda rows: rows.set_column(1, "checkpoint", [pa.array([1.5] * 8)]), "holds double; expected whole numbers"),
        (lambda rows: rows.replace_schema_metadata(None), "was not written together with"),
    ],
)
def test_a_perplexity_table_that_is_not_whole_is_refused(change, message, tmp_path):
    path = table(tmp_path / "a") / "perplexity.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    table(tmp_path / "b", **MORE)
    with pytest.raises(ArtifactError, match=f"perplexity.parquet.*{message}"):
        merge_scores([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "merged")


def test_merging_needs_two_tables_and_a_new_folder(tmp_path):
    source = str(table(tmp_path / "a"))
    for sources in ([source], [source, source]):
        with pytest.raises(ConfigError, match="expected two or more tables, each once"):
            merge_scores(sources, tmp_path / "merged")
    for command in (lambda: merge_scores([source, source], tmp_path / "a"), lambda: export_scores(source, tmp_path / "a")):
        with pytest.raises(ConfigError, match=f"--to: {tmp_path / 'a'} exists. Name a new folder"):
            command()


# Export and show


def test_an_exported_folder_has_a_card_that_names_configs_and_making(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "confidence.parquet", "perplexity.parquet"]
    _, front, text = (exported / "README.md").read_text().split("---\n", 2)
    configs = {entry["config_name"]: entry["data_files"] for entry in yaml.safe_load(front)["configs"]}
    assert configs == {"confidence": "confidence.parquet", "perplexity": "perplexity.parquet"}
    for part in ("owner/small at abc", "10, 20, 30", "rows.jsonl", "tokenizer: t", "max_length: 64", "torch 2; commit c", "rank: 2."):
        assert part in text
    assert fit_scores(read_scores(exported), IDS, FINGERPRINTS, allow_not_finite=True).tolist() == [0, 1, 2, 3]


def test_a_table_that_is_not_whole_is_not_exported(tmp_path):
    (table(tmp_path / "t") / "perplexity.parquet").unlink()
    with pytest.raises(ArtifactError, match="holds no perplexity.parquet"):
        export_scores(str(tmp_path / "t"), tmp_path / "hub")
    with pytest.raises(ArtifactError, match="is one file; this needs the folder"):
        export_scores(str(tmp_path / "t" / "confidence.parquet"), tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_show_names_making_quantiles_extremes_and_what_is_not_finite(tmp_path):
    ids = [f"id-{n}" for n in range(12)]
    sums = {10: np.log(np.array([*range(1, 12), NAN])), 20: np.log(np.array([*range(1, 12), 1.0]))}  # confidence -1 to -11
    lines = show_scores(str(table(tmp_path / "t", ids=ids, counts=[1] * 12, sums=sums)), num=2)
    assert lines[0].endswith("12 examples") and "checkpoints: 10, 20" in lines and "models: owner/small at abc" in lines
    row = next(line for line in lines if line.startswith("confidence ")).split()[1:]
    assert [float(value) for value in row] == pytest.approx([-11, -10.5, -8.5, -6, -3.5, -1.5, -1])
    most, least = lines.index("most confident:"), lines.index("least confident:")
    assert [line.split()[0] for line in lines[most + 1 : most + 3]] == ["id-0", "id-1"] and lines[most + 3] == ""
    assert [line.split()[0] for line in lines[least + 1 : least + 3]] == ["id-10", "id-9"] and lines[least + 3] == ""
    assert lines[-1] == "not finite: 1 (first 'id-11')"


def test_show_takes_a_table_where_nothing_is_finite_and_one_of_ones_own(tmp_path):
    nothing = show_scores(str(table(tmp_path / "t", sums={10: np.full(4, NAN)})))
    assert "confidence      no finite value" in nothing and "not finite: 4" in nothing[-1]
    lines = show_scores(str(own_table(tmp_path / "own.parquet", quality=[3, 1, 2])), num=1, column="quality")
    assert "the column 'quality' is taken for the confidence, no sftmix metadata" in lines and "  a  3" in lines and "  b  1" in lines


def test_the_page_about_tables_shows_code_that_runs_and_commands_that_are_known(tmp_path, monkeypatch):
    from sftmix.cli import _parser

    page = (ROOT / "docs" / "scores.md").read_text()
    table(tmp_path / "confidence", sums={10: np.array([NAN, 1.0, 2.0, 3.0])})
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    seen = {}
    exec(code, seen)
    assert [row[0] for row in seen["hardest"]][:3] == ["c", "d", "a"] and len(seen["frame"]) == 4
    commands = re.findall(r"^    sftmix (scores .*?)(?:  #.*)?$", page, re.M)
    assert {_parser().parse_args(line.split()).scores_command for line in commands} == {"show", "check", "merge", "export"}


# The command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config whose data stage has run; returns (config, ids of its training examples, fingerprints of its table)."""
    from sftmix.data.batches import TokenisedExamples
    from sftmix.engine.distributed import resolve_precision

    folder = tmp_path_factory.mktemp("run")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "run": {"dir": str(folder / "run")},
        "model": {"architecture": {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 256}},
        "tokenizer": {"train": {"vocab_size": 330}},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 256},
        "confidence": {"mode": "live", "compare": ["online"]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    assert main(["data", str(folder / "run.yaml")]) == 0
    facts = artifacts.verify(folder / "run" / "data").facts
    ids = TokenisedExamples(folder / "run" / "data" / "train.arrow").example_ids.to_pylist()
    return folder / "run.yaml", ids, {**facts["fingerprints"], "dtype": resolve_precision("auto")}


def fitting(folder, ids, fingerprints):
    return table(folder, ids=ids, counts=[2] * len(ids), sums={5: np.arange(len(ids)) / 9}, fingerprints=fingerprints)


def command(capsys, *arguments):
    code = main(["scores", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out, said.err


def test_check_ends_with_0_where_the_table_fits_and_with_2_where_not(run, tmp_path, capsys):
    config, ids, fingerprints = run
    good = fitting(tmp_path / "good", ids[::-1], fingerprints)
    code, out, _ = command(capsys, "check", good, config)
    assert code == 0 and f"{good} fits the {len(ids)} training examples" in out
    other = fitting(tmp_path / "other", ids, {**fingerprints, "template": "p"})
    code, _, err = command(capsys, "check", other, config)
    assert code == 2 and "template is 'p' in the table" in err and "confidence.allow_differences=[template]" in err
    code, out, _ = command(capsys, "check", other, config, "confidence.allow_differences=[template]")
    assert code == 0
    code, _, err = command(capsys, "check", fitting(tmp_path / "more", [*ids, "x"], fingerprints), config)
    report = config.parent / "run" / "scores_that_do_not_fit.jsonl"
    assert code == 2 and "1 scores have no example (first 'x')" in err and str(report) in err and report.is_file()


def test_check_needs_the_data_stage_of_this_very_config(run, tmp_path, capsys):
    config, ids, fingerprints = run
    good = fitting(tmp_path / "good", ids, fingerprints)
    for override in ("data.max_length=128", f"run.dir={tmp_path / 'elsewhere'}"):
        code, _, err = command(capsys, "check", good, config, override)
        assert code == 2 and "is missing, or was made with other settings. Run `sftmix data" in err


def test_check_says_that_the_data_stage_has_left_no_fingerprints(run, tmp_path, capsys):
    config, ids, fingerprints = run
    manifest = config.parent / "run" / "data" / "manifest.json"
    before = manifest.read_text()
    content = json.loads(before)
    del content["facts"]["fingerprints"]
    manifest.write_text(json.dumps(content))
    try:
        code, _, err = command(capsys, "check", fitting(tmp_path / "good", ids, fingerprints), config)
    finally:
        manifest.write_text(before)
    assert code == 2 and "manifest.json has no fingerprints" in err and "--force" in err


def test_tables_are_shown_merged_and_exported_from_the_command_line(tmp_path, capsys):
    a, b = table(tmp_path / "a"), table(tmp_path / "b", **MORE)
    code, out, _ = command(capsys, "merge", a, b, "--to", tmp_path / "merged")
    assert code == 0 and "merged: 6 examples, 2 checkpoints" in out
    code, out, _ = command(capsys, "show", tmp_path / "merged", "--num", 1)
    assert code == 0 and "6 examples" in out and "most confident:" in out
    code, out, _ = command(capsys, "export", tmp_path / "merged", "--to", tmp_path / "hub")
    assert code == 0 and out.strip() == str(tmp_path / "hub") and (tmp_path / "hub" / "README.md").is_file()
    code, _, err = command(capsys, "merge", a, a, "--to", tmp_path / "new")
    assert code == 2 and err.startswith("sftmix: error: scores merge")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scores"], "COMMAND"),
        (["scores", "show"], "TABLE"),
        (["scores", "merge", "a", "b"], "--to"),
        (["scores", "show", "a", "train.epochs=1"], "unrecognized arguments: train.epochs=1"),
        (["scores", "check", "a"], "CONFIG"),
        (["scores", "check", "a", "b", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_command_line_of_scores_ends_with_usage_and_code_2(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_overrides_of_check_may_stand_behind_an_option(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="Did you mean `epochs`"):
        main(["scores", "check", str(tmp_path), str(run[0]), "--debug", "train.epohcs=1"])
    code, _, err = command(capsys, "check", tmp_path, run[0], "train.epohcs=1")
    assert code == 2 and "Did you mean `epochs`?" in err


def test_help_and_show_do_not_load_torch(tmp_path):
    folder = table(tmp_path / "t")
    script = (
        "import sys, sftmix.cli\ntry:\n    sftmix.cli.main(['scores', '--help'])\nexcept SystemExit:\n    pass\n"
        "first = set(sys.modules)\nassert 'numpy' not in first and 'pyarrow' not in first\n"
        "assert sftmix.cli.main(['scores', 'show', sys.argv[1]]) == 0\n"
        "assert 'pyarrow' in sys.modules and not {'torch', 'transformers', 'datasets', 'pydantic'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
