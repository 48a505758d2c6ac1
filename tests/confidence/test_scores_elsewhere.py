"""Score tables that come from elsewhere: of one's own making, damaged, or not there."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import COUNTS, FINGERPRINTS, IDS, METADATA, SUMS, own_table, table

from sftmix.confidence.table import fit_scores, read_scores, write_scores
from sftmix.errors import ArtifactError
from sftmix.storage import artifacts


def test_a_table_of_ones_own_needs_a_named_column_and_is_said_to_be_unchecked(tmp_path, capsys):
    path = own_table(tmp_path / "own.parquet", quality=[3, 1, 2], confidence=[1.0, 2.0, 3.0])
    with pytest.raises(
        ArtifactError, match=r"no sftmix metadata.*`confidence.scores_column=quality`"
    ):
        read_scores(path)
    found = read_scores(path, column="quality")
    assert fit_scores(found, ["c", "a", "b"], FINGERPRINTS).tolist() == [2, 0, 1]
    assert "no sftmix metadata: only its ids are compared" in capsys.readouterr().out
    assert found.confidence.schema.names == [
        "example_id",
        "confidence",
        "variability",
        "minimum",
        "maximum",
        "rank",
    ]
    assert found.confidence["confidence"].to_pylist() == [3.0, 1.0, 2.0] and found.confidence[
        "rank"
    ].to_pylist() == [1, 3, 2]
    assert found.confidence["variability"].null_count == 3
    assert read_scores(path, column="confidence").values.tolist() == [1.0, 2.0, 3.0]


def test_another_column_of_our_own_table_is_still_checked(tmp_path):
    found = read_scores(table(tmp_path / "t"), column="variability")
    with pytest.raises(ArtifactError, match="tokenizer is 't'"):
        fit_scores(found, IDS, {**FINGERPRINTS, "tokenizer": "u"})
    assert found.confidence["confidence"].equals(
        pq.read_table(tmp_path / "t" / "confidence.parquet")["variability"]
    )
    # what it says of `confidence` would not be true
    assert found.confidence.schema.metadata is None


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_ids_as_other_libraries_write_them_are_read(kind, tmp_path):
    pq.write_table(
        pa.table({"example_id": pa.array(["a", "b"]).cast(kind), "q": pa.array([1, None])}),
        tmp_path / "own.parquet",
    )
    found = read_scores(tmp_path / "own.parquet", column="q")
    assert (
        found.example_ids.to_pylist() == ["a", "b"]
        and found.values[0] == 1
        and np.isnan(found.values[1])
    )
    with pytest.raises(
        ArtifactError, match=r"the q of 1 example is infinite, NaN or null \(first 'b'\)"
    ):
        fit_scores(found, ["a", "b"], {})


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        (
            {"q": [1, 2, 3]},
            "quality",
            r"own.parquet: the column 'quality' is not there; it has example_id, q",
        ),
        ({"q": ["x", "y", "z"]}, "q", r"the column 'q' holds string; expected numbers"),
        ({"q": [True, False, True]}, "q", r"the column 'q' holds bool; expected numbers"),
        (
            {"example_id": [1, 2, 3], "q": [1, 2, 3]},
            "q",
            r"the column 'example_id' holds int64; expected text",
        ),
        ({"example_id": ["a", "b", None], "q": [1, 2, 3]}, "q", r"1 row has no example_id"),
        (
            {"example_id": ["a", "b", "a"], "q": [1, 2, 3]},
            "q",
            r"1 id stands in several rows \(first 'a'\)",
        ),
    ],
)
def test_what_is_wrong_with_a_table_of_ones_own_is_said(columns, column, message, tmp_path):
    path = (
        own_table(tmp_path / "own.parquet", **columns)
        if "example_id" not in columns
        else tmp_path / "own.parquet"
    )
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], **columns}), path)
    with pytest.raises(ArtifactError, match=message):
        fit_scores(read_scores(path, column=column), ["a", "b", "c"], FINGERPRINTS)


def with_a_changed_byte(content, at):
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


@pytest.mark.parametrize(
    "change",
    [lambda content: content[: len(content) // 2], lambda content: b"example_id,confidence\na,1\n"],
)
def test_a_file_that_is_cut_off_or_no_parquet_is_one_clear_error(change, tmp_path):
    path = table(tmp_path / "t") / "confidence.parquet"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        ArtifactError,
        match=r"confidence.parquet: cannot be read as Parquet: .* Get the table again.",
    ):
        read_scores(tmp_path / "t")


def test_no_changed_byte_in_the_pages_changes_a_score_in_silence(tmp_path):
    path = table(tmp_path / "t") / "confidence.parquet"
    content, expected = path.read_bytes(), read_scores(tmp_path / "t").values.tolist()
    num_refused = 0
    # what is between magic and footer
    for at in range(4, len(content) - int.from_bytes(content[-8:-4], "little") - 8):
        path.write_bytes(with_a_changed_byte(content, at))
        try:
            found = read_scores(tmp_path / "t")
            assert found.values.tolist() == expected and found.example_ids.to_pylist() == IDS, (
                f"byte {at}"
            )
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
        (
            b'{"format": 9}',
            r"the format of its sftmix metadata is 9; this version reads 1. Update sftmix",
        ),
        (b"[1]", r"metadata is \[1\]"),
        (
            b'{"format": 1, "mode": "live"}',
            "checkpoints, commit, dataset, fingerprints, models, versions is missing",
        ),
        (
            json.dumps({**dataclasses.asdict(METADATA), "models": "m"}).encode(),
            "models is missing, unknown, empty or of a wrong type",
        ),
        (
            json.dumps({**dataclasses.asdict(METADATA), "checkpoints": ["x"]}).encode(),
            "checkpoints is missing",
        ),
    ],
)
def test_metadata_that_cannot_be_trusted_is_refused(content, message, tmp_path):
    rows = pq.read_table(table(tmp_path / "t") / "confidence.parquet")
    pq.write_table(
        rows.replace_schema_metadata({b"sftmix": content}), tmp_path / "t" / "confidence.parquet"
    )
    with pytest.raises(ArtifactError, match=message):
        read_scores(tmp_path / "t")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "TMP/none",
            (
                "none does not exist. Give a folder with confidence.parquet, a Parquet file, or a"
                " Hub name"
            ),
        ),
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
