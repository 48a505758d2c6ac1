"""Score tables for others: who can open them, the folder for the Hub, and what `show` says."""

import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from processes import ROOT
from score_tables import FINGERPRINTS, IDS, NAN, SUMS, own_table, table
from stub_hub import stub_hub

from sftmix.cli import main
from sftmix.confidence.commands import export_scores, show_scores
from sftmix.confidence.table import fit_scores, read_scores
from sftmix.errors import ArtifactError

NAMES = ("confidence", "perplexity")


def expected_columns(folder, name):
    return {
        key: [None if v != v else v for v in values]
        for key, values in pq.read_table(folder / f"{name}.parquet").to_pydict().items()
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    table(folder / "t", sums={**SUMS, 30: np.array([NAN, 1e6, 1.0, 2.0])})
    return export_scores(str(folder / "t"), folder / "hub")


def test_a_table_is_pushed_as_a_data_set(exported, tmp_path, monkeypatch):
    table(tmp_path / "t", sums={**SUMS, 30: np.array([NAN, 1e6, 1.0, 2.0])})
    with stub_hub(monkeypatch) as hub:
        assert main(["scores", "export", str(tmp_path / "t"), "--push", "me/scores"]) == 0
        repository = hub.repositories["dataset", "me/scores"]
    del repository.files[".gitattributes"]
    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert repository.private and repository.files == files


def without_nan(columns):
    return {
        key: [None if v is None or v != v else v for v in values] for key, values in columns.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_pandas(name, exported):
    import pandas

    assert without_nan(
        pandas.read_parquet(exported / f"{name}.parquet").to_dict("list")
    ) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_polars(name, exported):
    import polars

    assert without_nan(
        polars.read_parquet(exported / f"{name}.parquet").to_dict(as_series=False)
    ) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_in_duckdb(name, exported):
    import duckdb

    with duckdb.connect() as connection:
        found = connection.execute(
            "select * from read_parquet(?)", [str(exported / f"{name}.parquet")]
        )
        columns = [column[0] for column in found.description]
        rows = found.fetchall()
    assert without_nan(
        dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
    ) == expected_columns(exported, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_opens_in_datasets_under_the_names_of_its_card(name, exported, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(exported), name, split="train", cache_dir=str(tmp_path))
    assert without_nan(loaded.to_dict()) == expected_columns(exported, name)


def test_an_exported_folder_has_a_card_that_names_configs_and_making(exported):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "confidence.parquet",
        "perplexity.parquet",
    ]
    _, front, text = (exported / "README.md").read_text().split("---\n", 2)
    configs = {
        entry["config_name"]: entry["data_files"] for entry in yaml.safe_load(front)["configs"]
    }
    assert configs == {"confidence": "confidence.parquet", "perplexity": "perplexity.parquet"}
    for part in (
        "owner/small at abc",
        "10, 20, 30",
        "rows.jsonl",
        "tokenizer: t",
        "max_length: 64",
        "torch 2; commit c",
        "rank: 2.",
    ):
        assert part in text
    assert fit_scores(read_scores(exported), IDS, FINGERPRINTS, allow_not_finite=True).tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_a_table_that_is_not_whole_is_not_exported(tmp_path):
    (table(tmp_path / "t") / "perplexity.parquet").unlink()
    with pytest.raises(ArtifactError, match="holds no perplexity.parquet"):
        export_scores(str(tmp_path / "t"), tmp_path / "hub")
    with pytest.raises(ArtifactError, match="is one file; this needs the folder"):
        export_scores(str(tmp_path / "t" / "confidence.parquet"), tmp_path / "hub")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]


def test_show_names_making_quantiles_extremes_and_what_is_not_finite(tmp_path):
    ids = [f"id-{n}" for n in range(12)]
    # confidence -1 to -11
    sums = {10: np.log(np.array([*range(1, 12), NAN])), 20: np.log(np.array([*range(1, 12), 1.0]))}
    lines = show_scores(str(table(tmp_path / "t", ids=ids, counts=[1] * 12, sums=sums)), num=2)
    assert (
        lines[0].endswith("12 examples")
        and "checkpoints: 10, 20" in lines
        and "models: owner/small at abc" in lines
    )
    row = next(line for line in lines if line.startswith("confidence ")).split()[1:]
    assert [float(value) for value in row] == pytest.approx([-11, -10.5, -8.5, -6, -3.5, -1.5, -1])
    most, least = lines.index("most confident:"), lines.index("least confident:")
    assert [line.split()[0] for line in lines[most + 1 : most + 3]] == ["id-0", "id-1"] and lines[
        most + 3
    ] == ""
    assert [line.split()[0] for line in lines[least + 1 : least + 3]] == [
        "id-10",
        "id-9",
    ] and lines[least + 3] == ""
    assert lines[-1] == "not finite: 1 (first 'id-11')"


def test_show_takes_a_table_where_nothing_is_finite_and_one_of_ones_own(tmp_path):
    nothing = show_scores(str(table(tmp_path / "t", sums={10: np.full(4, NAN)})))
    assert "confidence      no finite value" in nothing and "not finite: 4" in nothing[-1]
    lines = show_scores(
        str(own_table(tmp_path / "own.parquet", quality=[3, 1, 2])), num=1, column="quality"
    )
    assert (
        "the column 'quality' is taken for the confidence, no sftmix metadata" in lines
        and "  a  3" in lines
        and "  b  1" in lines
    )


def test_the_page_about_tables_shows_code_that_runs_and_commands_that_are_known(
    tmp_path, monkeypatch
):
    from sftmix.cli import _parser

    page = (ROOT / "docs" / "scores.md").read_text()
    table(tmp_path / "confidence", sums={10: np.array([NAN, 1.0, 2.0, 3.0])})
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    seen = {}
    exec(code, seen)
    assert [row[0] for row in seen["hardest"]][:3] == ["c", "d", "a"] and len(seen["frame"]) == 4
    commands = re.findall(r"^    sftmix (scores .*?)(?:  #.*)?$", page, re.M)
    assert {_parser().parse_args(line.split()).scores_command for line in commands} == {
        "show",
        "check",
        "merge",
        "export",
    }


def test_a_table_on_the_hub_is_downloaded_file_by_file(exported, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *args, **options: asked.append((args, options)) or str(exported),
    )
    found = read_scores("owner/scores", "v1")
    assert asked == [
        (
            ("owner/scores",),
            {"repo_type": "dataset", "revision": "v1", "allow_patterns": ["confidence.parquet"]},
        )
    ]
    assert (
        found.metadata is not None
        and found.metadata.mode == "checkpoints"
        and found.example_ids.to_pylist() == IDS
    )
    assert found.perplexity_path == exported / "perplexity.parquet"
    assert (
        asked[1][1]["allow_patterns"] == ["perplexity.parquet"] and asked[1][1]["revision"] == "v1"
    )


def test_a_dataset_on_the_hub_without_a_table_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(tmp_path))
    with pytest.raises(ArtifactError, match="owner/other holds no confidence.parquet"):
        read_scores("owner/other")


# offline, and no name that the Hub could have
@pytest.mark.parametrize("name", ["owner/none", "no name"])
def test_a_name_that_the_hub_does_not_give_is_refused(name, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ArtifactError,
        match=(
            f"{name} is not a local folder, and the Hub does not give .*"
            "at revision v1.*Check the name"
        ),
    ):
        read_scores(name, "v1")
