"""The split stage on files: what it writes equals what is computed in memory, whatever the order,
the column and the strata."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matchings import match_parts, split_by_confidence

from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence import table_files
from sftmix.config.schema import Config
from sftmix.data.prepare import SCHEMA
from sftmix.errors import ArtifactError
from sftmix.pairing import on_files

COUNT = 1003


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """COUNT examples with a score table, read in batches of 100 rows; split(**settings) runs the
    stage's work."""
    monkeypatch.setattr(on_files, "ROWS_PER_GROUP", 100)
    rng = np.random.default_rng(0)
    ids = [f"{n:08x}" for n in rng.permutation(COUNT * 3)[:COUNT]]
    lengths = rng.integers(1, 60, COUNT)
    columns = {
        "example_id": ids,
        "messages": ["[]"] * COUNT,
        "place": [""] * COUNT,
        "group": rng.choice(["a", "b"], COUNT),
        "is_noisy": [False] * COUNT,
        "input_ids": [[1]] * COUNT,
        "response_mask": [[True]] * COUNT,
        "num_tokens": lengths + 3,
        "num_response_tokens": lengths,
        "is_truncated": [False] * COUNT,
    }
    for name in ("data", "score", "split"):
        (tmp_path / name).mkdir()
    with (
        pa.OSFile(str(tmp_path / "data" / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        writer.write_table(
            pa.table([columns[field.name] for field in SCHEMA], schema=SCHEMA), max_chunksize=77
        )
    values = {
        "confidence": rng.integers(-9, 0, COUNT).astype(float),
        "quality": rng.integers(0, 5, COUNT).astype(np.uint8),
    }
    # minus the smallest is no int32
    values["votes"] = rng.choice([-(2**31), 0, 2**31 - 1], COUNT).astype(np.int32)
    pq.write_table(
        pa.table({"example_id": ids, **values}),
        tmp_path / "score" / table_files.CONFIDENCE,
        row_group_size=333,
    )
    examples = TokenisedExamples(tmp_path / "data" / "train.arrow")

    def split(**settings):
        needed = {
            "model": {"architecture": {"model_type": "llama"}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"path": "x"},
        }
        config = Config.model_validate(
            {**needed, "run": {"dir": tmp_path}, "mixup": {"length_block": 8}, "split": settings}
        )
        table, folder = tmp_path / "score" / table_files.CONFIDENCE, tmp_path / "split"
        return (
            config,
            examples,
            on_files.split_scores(
                table, examples.table.data.table, config.split, folder, seed=config.run.seed
            ),
        )

    return split, columns, values


@pytest.mark.parametrize("highest_is_confident", [True, False])
@pytest.mark.parametrize("column", ["confidence", "quality", "votes"])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.3)])
def test_parts_and_matchings_equal_those_in_memory(
    stage, column, highest_is_confident, shares, tmp_path
):
    split, columns, values = stage
    settings = {"column": column, "highest_is_confident": highest_is_confident}
    config, examples, sizes = split(
        **settings, confident_share=shares[0], unconfident_share=shares[1]
    )
    signed = values[column].astype(float) * (1 if highest_is_confident else -1)
    expected = split_by_confidence(
        columns["example_id"], signed, confident_share=shares[0], unconfident_share=shares[1]
    )
    written = pq.read_table(tmp_path / "split" / on_files.SPLIT)
    assert (
        written["example_id"].to_pylist() == columns["example_id"]
        and written["part"].to_pylist() == expected
    )
    lengths = examples.column("num_response_tokens")
    on_files.write_parts(tmp_path / "split", sizes, lengths)
    for way in ("random", "length"):
        found = on_files.open_matching(tmp_path / "split", config.mixup, config.run.seed, way)
        in_memory = match_parts(
            np.array(expected), lengths, seed=0, alpha=0.5, by_length=way == "length", block_pairs=8
        )
        assert isinstance(found.confident, np.memmap)
        for epoch in (0, 1):
            got, wanted = (
                matching.units(epoch, 0, matching.num_units) for matching in (found, in_memory)
            )
            assert np.array_equal(got.units, wanted.units) and np.array_equal(got.lam, wanted.lam)
    coverage = on_files.mix_coverages(tmp_path / "split", lengths, config.mixup, config.run.seed)
    assert coverage["random"] < coverage["length"] <= 1


def test_strata_come_from_the_data(stage, tmp_path):
    split, columns, values = stage
    _, _, _ = split(stratify_by="group", confident_share=0.3, unconfident_share=0.3)
    parts = np.array(pq.read_table(tmp_path / "split" / on_files.SPLIT)["part"].to_pylist())
    for group in ("a", "b"):
        rows = np.flatnonzero(columns["group"] == group)
        ids = [columns["example_id"][row] for row in rows]
        shares = {"confident_share": 0.3, "unconfident_share": 0.3}
        assert parts[rows].tolist() == split_by_confidence(
            ids, values["confidence"][rows], **shares
        )
    # no table left over
    assert [path.name for path in (tmp_path / "split").iterdir()] == [on_files.SPLIT]


@pytest.mark.parametrize(
    ("change", "message"),
    [("order", "not in the order of the data, near row 500"), ("rows", "1,002 rows for 1,003")],
)
def test_a_table_in_another_order_is_refused(stage, tmp_path, change, message):
    path = tmp_path / "score" / table_files.CONFIDENCE
    table = pq.read_table(path)
    order = np.arange(COUNT)
    order[[512, 513]] = [513, 512]
    pq.write_table(table.take(order) if change == "order" else table.slice(1), path)
    with pytest.raises(ArtifactError, match=message):
        stage[0]()


def test_a_random_split_has_nothing_to_do_with_the_scores(stage, tmp_path):
    split, _, values = stage
    split(column="random")
    parts = pq.read_table(tmp_path / "split" / on_files.SPLIT)["part"].to_pylist()
    num = len(parts)
    assert abs(parts.count("confident") - parts.count("unconfident")) <= num % 2
    is_confident = np.array([part == "confident" for part in parts])
    high = values["confidence"] > np.median(values["confidence"])
    # about half of the confident ones: four standard deviations of the hypergeometric distribution
    assert abs((is_confident & high).sum() - num / 4) <= 4 * np.sqrt(num / 16) + 1
    split(column="random", highest_is_confident=False)
    turned = pq.read_table(tmp_path / "split" / on_files.SPLIT)["part"].to_pylist()
    assert parts != turned  # from the other end


def test_within_halves_no_pair_crosses_and_all_examples_are_there_once(stage, tmp_path):
    split, _, _ = stage
    for shares in ((0.5, 0.5), (0.4, 0.3)):
        config, examples, sizes = split(confident_share=shares[0], unconfident_share=shares[1])
        folder = tmp_path / "split"
        on_files.write_parts(folder, sizes, examples.column("num_response_tokens"))
        found = on_files.open_matching(folder, config.mixup, 0, "within_halves")
        part = np.array(pq.read_table(folder / on_files.SPLIT)["part"].to_pylist())
        smaller = min(sizes["confident"], sizes["unconfident"])
        assert found.num_pairs == smaller // 2 * 2
        for epoch in range(3):
            units = found.units(epoch, 0, found.num_units).units
            pairs = units[units[:, 1] >= 0]
            assert (part[pairs[:, 0]] == part[pairs[:, 1]]).all()
            assert sorted(units[units >= 0].tolist()) == list(range(len(part)))
        again = found.units(0, 0, found.num_units).units
        assert not np.array_equal(units, again)  # other partners in another epoch
