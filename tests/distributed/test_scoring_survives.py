"""Scoring that is killed anywhere, on any rank, and started again with any number of ranks ends
with the table of a run that nothing disturbed, bit for bit where each rank computes with as many
threads; and what was scored is not scored again."""

import json
import random
import re
import shutil

import pyarrow.parquet as pq
import pytest
from processes import sftmix, sftmix_on_ranks
from tiny import TINY

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture
QUICKSTART = "configs/quickstart.yaml"
# Equal bits need equal threads: one process would have all cores, and each of two half of them.
OPTIONS = [
    *TINY,
    "engine.num_threads=1",
    "confidence.unit_examples=8",
    "confidence.micro_batch_tokens=300",
    "reference.num_checkpoints=2",
]
NUM_UNITS, NUM_CHECKPOINTS = 8, 2  # 61 examples
TABLES = ("perplexity.parquet", "confidence.parquet")

# Every write, flush and rename between a score and the published table.
SITES = [
    "score.forward", "shard.write", "shard.flush", "shard.rename", "shard.manifest", "shard.done",
    "publish.manifest", "publish.aside", "publish.rename", "publish.done",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run folder in which the reference run is done, and nothing is scored."""
    folder = tmp_path_factory.mktemp("survives") / "run"
    sftmix("data", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    sftmix("reference", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return folder


def score(folder, num_ranks, **options):
    return sftmix_on_ranks(num_ranks, "score", QUICKSTART, *OPTIONS, f"run.dir={folder}", **options)


@pytest.fixture(scope="module")
def undisturbed(reference, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    shutil.copytree(reference, folder)
    score(folder, 1)
    return tables_of(folder)


@pytest.fixture
def folder(reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


def tables_of(folder):
    return [pq.read_table(folder / "confidence" / name) for name in TABLES]


def finished_shards(folder):
    """Returns file -> moment of writing of every shard that is vouched for."""
    return {
        path.relative_to(folder): path.with_suffix(".parquet").stat().st_mtime_ns
        for path in folder.glob("work/*/*/unit_*.json")
    }


def assert_survives(folder, undisturbed, *, fault, killed_ranks, restart_ranks):
    done = score(folder, killed_ranks, check=False, fault=fault)
    assert done.returncode != 0, f"{fault} was never reached:\n{done.stdout[-1500:]}"
    before = finished_shards(folder)
    again = score(folder, restart_ranks, check=False)
    assert again.returncode == 0, again.stdout[-2000:] + again.stderr[-2000:]
    assert tables_of(folder) == undisturbed
    # What was whole is resumed, not scored again.
    kept = sum(
        int(count) for count in re.findall(r"(\d+) of \d+ units already scored", again.stdout)
    )
    assert kept == (0 if "[3/8] score: up to date" in again.stdout else len(before))
    assert not list((folder / "work").glob("*"))


@pytest.mark.parametrize(
    ("sharding", "num_ranks"),
    [
        ("replicated", 2),
        ("zero3", 3),
        pytest.param("replicated", 3, marks=TORTURE),
        pytest.param("zero3", 2, marks=TORTURE),
    ],
)
def test_the_table_does_not_depend_on_ranks_or_sharding(folder, undisturbed, sharding, num_ranks):
    options = [*OPTIONS, f"run.dir={folder}", f"confidence.sharding={sharding}"]
    sftmix_on_ranks(num_ranks, "score", QUICKSTART, *options)
    assert tables_of(folder) == undisturbed


def test_with_other_threads_the_table_is_the_same_to_rounding(folder, undisturbed):
    sftmix("score", QUICKSTART, *OPTIONS, f"run.dir={folder}", "engine.num_threads=3")
    for found, expected in zip(tables_of(folder), undisturbed, strict=True):
        assert found.schema.names == expected.schema.names
        for name in set(found.schema.names) - {"rank"}:  # neighbours may change places
            values, wanted = found[name].to_pylist(), expected[name].to_pylist()
            is_number = isinstance(wanted[0], float)
            assert values == (pytest.approx(wanted, rel=1e-6, abs=1e-6) if is_number else wanted)
    facts = json.loads((folder / "confidence" / "manifest.json").read_text())["facts"]
    assert facts["num_threads"] == 3 and facts["precision"] == "fp32"


@pytest.mark.parametrize(
    ("site", "hit", "restart_ranks"),
    [("shard.rename", 3, 1), ("shard.manifest", 5, 2), ("publish.rename", 1, 1)],
)
def test_killed_at_a_rename_and_started_again(folder, undisturbed, site, hit, restart_ranks):
    assert_survives(
        folder,
        undisturbed,
        fault=f"{site}:0:{hit}:kill9",
        killed_ranks=1,
        restart_ranks=restart_ranks,
    )


def test_killed_on_the_other_rank(folder, undisturbed):
    # Units go to whoever is free: rank 0 is slow, so that rank 1 gets to its fourth.
    assert_survives(
        folder,
        undisturbed,
        fault="score.forward:1:4:kill9,score.forward:0:*:sleep",
        killed_ranks=2,
        restart_ranks=1,
    )


def test_a_damaged_shard_is_set_aside_and_scored_again(folder, undisturbed):
    assert score(folder, 1, check=False, fault="shard.write:0:7:kill9").returncode != 0
    shard = sorted(folder.glob("work/*/*/unit_000002.parquet"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = score(folder, 1)
    assert (
        "unit_000002.parquet is damaged: set aside" in again.stdout
        and "5 of 8 units already scored" in again.stdout
    )
    assert tables_of(folder) == undisturbed


def test_a_full_disk_is_an_error_and_not_a_hole(folder, undisturbed):
    done = score(folder, 1, check=False, fault="shard.flush:0:3:enospc")
    assert done.returncode != 0 and "No space left" in done.stdout + done.stderr
    score(folder, 1)
    assert tables_of(folder) == undisturbed


def test_other_settings_take_up_nothing(folder):
    assert score(folder, 1, check=False, fault="shard.write:0:5:kill9").returncode != 0
    again = sftmix(
        "score", QUICKSTART, *OPTIONS, f"run.dir={folder}", "confidence.unit_examples=16"
    )
    assert "are there already" not in again.stdout


@TORTURE
@pytest.mark.parametrize("site", SITES)
def test_killed_at_every_write_flush_and_rename(folder, undisturbed, site):
    rng = random.Random(site)
    hit = 1 if site.startswith("publish") else rng.randint(1, NUM_UNITS)
    assert_survives(
        folder,
        undisturbed,
        fault=f"{site}:0:{hit}:kill9",
        killed_ranks=1,
        restart_ranks=rng.randint(1, 3),
    )


@TORTURE
@pytest.mark.parametrize("number", range(25))
def test_killed_at_random(folder, undisturbed, number):
    rng = random.Random(number)
    ranks = rng.randint(1, 3)
    site, rank = rng.choice(SITES[:6]), rng.randrange(ranks)
    # Units go to whoever is free: a rank may have had any number of them, so only the first hit is
    # certain.
    fault = f"{site}:{rank if ranks == 1 else '*'}:{rng.randint(1, 4)}:kill9"
    assert_survives(
        folder, undisturbed, fault=fault, killed_ranks=ranks, restart_ranks=rng.randint(1, 3)
    )
