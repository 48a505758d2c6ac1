"""Score tables that are merged: more examples, more checkpoints, and what makes no sense
together."""

import math
import statistics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import COUNTS, FINGERPRINTS, IDS, OTHERS, SUMS, table

from sftmix.confidence.commands import export_scores
from sftmix.confidence.merge import merge_scores
from sftmix.confidence.table import read_scores
from sftmix.errors import ArtifactError, ConfigError
from sftmix.storage import artifacts


def test_tables_of_disjoint_examples_are_joined_and_ranked_anew(tmp_path):
    other = {**FINGERPRINTS, "data": "another"}
    sources = [
        table(tmp_path / "a"),
        table(tmp_path / "b", **OTHERS, dataset=["more.jsonl"], fingerprints=other),
    ]
    sums = {step: np.concatenate([SUMS[step], OTHERS["sums"][step]]) for step in (10, 20)}
    expected = table(
        tmp_path / "at-once",
        ids=[*IDS, *OTHERS["ids"]],
        counts=[*COUNTS, *OTHERS["counts"]],
        sums=sums,
    )
    summary = merge_scores([str(source) for source in sources], tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(expected / name))
    metadata = read_scores(tmp_path / "merged").metadata
    assert (
        summary.num_examples == 6
        and metadata.dataset == ["rows.jsonl", "more.jsonl"]
        and metadata.checkpoints == [10, 20]
    )
    assert metadata.fingerprints == {
        key: value for key, value in FINGERPRINTS.items() if key != "data"
    }
    manifest = artifacts.verify(tmp_path / "merged")
    assert manifest.stage == "scores merge" and set(manifest.inputs) == {
        str(source) for source in sources
    }


def test_more_checkpoints_of_the_same_examples_make_a_new_aggregate(tmp_path):
    rng = np.random.default_rng(2)
    sums = {step: rng.uniform(0, 9, 4) for step in (5, 10, 15, 20)}
    expected = table(tmp_path / "at-once", sums=sums)
    first = table(tmp_path / "a", sums={step: sums[step] for step in (20, 10)})
    order = [2, 0, 3, 1]  # the other table has another order of rows
    second = table(
        tmp_path / "b",
        ids=[IDS[n] for n in order],
        counts=COUNTS[order],
        sums={step: sums[step][order] for step in (5, 15)},
        commit="d",
    )
    merge_scores([str(first), str(second)], tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(pq.read_table(expected / name))
    metadata = read_scores(tmp_path / "merged").metadata
    assert (
        metadata.checkpoints == [5, 10, 15, 20]
        and metadata.fingerprints == FINGERPRINTS
        and metadata.commit == "c, d"
    )
    # and by hand
    values = [[math.exp(sums[step][n] / COUNTS[n]) for step in sums] for n in range(4)]
    merged = read_scores(tmp_path / "merged")
    assert merged.values == pytest.approx([-statistics.fmean(found) for found in values])


def test_a_perplexity_table_that_was_sorted_otherwise_is_merged_by_id(tmp_path):
    sources = [str(table(tmp_path / "a")), str(table(tmp_path / "b", **OTHERS))]
    merge_scores(sources, tmp_path / "expected")
    path = tmp_path / "a" / "perplexity.parquet"
    pq.write_table(pq.read_table(path).sort_by("nll_sum"), path)
    merge_scores(sources, tmp_path / "merged")
    for name in ("perplexity.parquet", "confidence.parquet"):
        assert pq.read_table(tmp_path / "merged" / name).equals(
            pq.read_table(tmp_path / "expected" / name)
        )


def test_models_keep_their_numbers_when_merged(tmp_path):
    def given(number):
        return {
            "mode": "models",
            "models": [{"path": f"model-{number}"}],
            "sums": {number: SUMS[10] * number},
        }

    sources = [str(table(tmp_path / str(number), **given(number))) for number in (3, 1, 2)]
    merge_scores(sources, tmp_path / "merged")
    metadata = read_scores(tmp_path / "merged").metadata
    assert metadata.checkpoints == [1, 2, 3] and [m["path"] for m in metadata.models] == [
        "model-1",
        "model-2",
        "model-3",
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({}, "hold the same examples, and several of them the checkpoints 10, 20"),
        ({"sums": {20: SUMS[20], 30: SUMS[10]}}, "the checkpoints 20"),
        (
            {**OTHERS, "fingerprints": {**FINGERPRINTS, "tokenizer": "u"}},
            r"different examples .* fingerprints.tokenizer is 't' in .*, 'u' in",
        ),
        (
            {**OTHERS, "sums": {10: OTHERS["sums"][10]}},
            r"different examples .* checkpoints is \[10, 20\] in .*, \[10\] in",
        ),
        ({**OTHERS, "models": [{"path": "owner/large"}]}, "different examples .* models is"),
        ({**OTHERS, "mode": "live"}, "mode is 'checkpoints' in .*, 'live' in"),
        ({**OTHERS, "commit": "d"}, "commit is 'c' in .*, 'd' in"),
        (
            {"sums": {30: SUMS[10]}, "fingerprints": {**FINGERPRINTS, "max_length": 8}},
            "same examples .* fingerprints.max_length is 64 in",
        ),
        (
            {"sums": {30: SUMS[10]}, "mode": "online"},
            "same examples .* mode is 'checkpoints' in .*, 'online' in",
        ),
        (
            {"sums": {30: SUMS[10]}, "models": [{"path": "owner/large"}]},
            "same examples .* models is",
        ),
        (
            {"sums": {30: SUMS[10]}, "counts": [1, 2, 4, 9]},
            r"1 example has another number of response tokens .* \(first 'c'\)",
        ),
        ({**OTHERS, "ids": ["f", "a"]}, r"\(4 examples\) and .* \(2\) share 1 \(first 'a'\)"),
        ({"ids": IDS[:2], "counts": COUNTS[:2], "sums": {30: SUMS[10][:2]}}, "share 2"),
    ],
)
def test_tables_that_make_no_sense_together_are_refused(other, message, tmp_path):
    sources = [str(table(tmp_path / "a")), str(table(tmp_path / "b", **other))]
    with pytest.raises(ArtifactError, match=message):
        merge_scores(sources, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_tables_of_both_kinds_are_merged_in_two_steps(tmp_path):
    sources = [
        table(tmp_path / "a"),
        table(tmp_path / "b", sums={30: SUMS[10]}),
        table(tmp_path / "c", **OTHERS),
    ]
    with pytest.raises(
        ArtifactError,
        match="some share all examples and some none. Merge those that share all first",
    ):
        merge_scores([str(source) for source in sources], tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.slice(1), "has 7 rows; 4 examples under 2 checkpoints are 8"),
        (
            lambda rows: pa.concat_tables([rows.slice(0, 7), rows.slice(0, 1)]),
            "checkpoint 10 has not one row for each example",
        ),
        (
            lambda rows: rows.set_column(3, "num_response_tokens", [pa.array(range(1, 9))]),
            "differs between checkpoints",
        ),
        (lambda rows: rows.set_column(3, "num_response_tokens", [pa.array([0] * 8)]), "is below 1"),
        (lambda rows: rows.drop_columns("nll_sum"), "the column 'nll_sum' is not there"),
        (
            lambda rows: rows.set_column(1, "checkpoint", [pa.array([1.5] * 8)]),
            "holds double; expected whole numbers",
        ),
        (lambda rows: rows.replace_schema_metadata(None), "was not written together with"),
    ],
)
def test_a_perplexity_table_that_is_not_whole_is_refused(change, message, tmp_path):
    path = table(tmp_path / "a") / "perplexity.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    table(tmp_path / "b", **OTHERS)
    with pytest.raises(ArtifactError, match=f"perplexity.parquet.*{message}"):
        merge_scores([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "merged")


def test_merging_needs_two_tables_and_a_new_folder(tmp_path):
    source = str(table(tmp_path / "a"))
    for sources in ([source], [source, source]):
        with pytest.raises(ConfigError, match="expected two or more tables, each once"):
            merge_scores(sources, tmp_path / "merged")
    for command in (
        lambda: merge_scores([source, source], tmp_path / "a"),
        lambda: export_scores(source, tmp_path / "a"),
    ):
        with pytest.raises(ConfigError, match=f"--to: {tmp_path / 'a'} exists. Name a new folder"):
            command()
