"""Checkpoint folders without ranks: what is vouched for, found, kept and set aside."""

import hashlib
import json
import os
import random
import shutil
import threading

import numpy as np
import pytest

from sftmix.errors import ArtifactError
from sftmix.storage import artifacts, provenance
from sftmix.storage.checkpoints import (
    STAGE,
    CheckpointFolder,
    HashedFile,
    check_space,
    find_problem,
)


def write(checkpoints, step, content=b"state" * 100):
    """Publishes a checkpoint of two files."""
    staging = checkpoints.new_staging(step)
    entries = {}
    for name in ("a.pt", "b.pt"):
        file = HashedFile(staging / name)
        file.write(content + name.encode())
        entries[name] = file.close()
    facts = {"step": step, "numbers": {"log": [[0.1, 1e-300, 5.25]]}, "kept": {}}
    checkpoints.publish(
        staging, step, artifacts.Manifest(STAGE, "f", {"rate": 0.5}, {"data": "d"}, entries, facts)
    )
    checkpoints.retain()


def problem_of(checkpoints, step):
    try:
        manifest = checkpoints.read(step)
    except ArtifactError as error:
        return str(error)
    return find_problem(checkpoints.path(step), manifest, list(manifest.files))


def test_every_one_of_a_thousand_flipped_bits_is_found(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    write(checkpoints, 7)
    assert problem_of(checkpoints, 7) is None
    rng, files = random.Random(0), sorted(checkpoints.path(7).iterdir())
    for path in files:
        original = path.read_bytes()
        for _ in range(1000):
            content = bytearray(original)
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            assert problem_of(checkpoints, 7) is not None, content
        path.write_bytes(original)
    assert len(files) == 3 and problem_of(checkpoints, 7) is None


@pytest.mark.parametrize(
    "how", ["a manifest of another step", "another stage's", "a link", "no manifest"]
)
def test_what_only_looks_like_a_checkpoint_is_none(tmp_path, how):
    checkpoints = CheckpointFolder(tmp_path)
    write(checkpoints, 7)
    if how == "a manifest of another step":
        shutil.copytree(checkpoints.path(7), checkpoints.path(8))
    elif how == "another stage's":
        artifacts.seal(checkpoints.path(7), stage="reference", settings={})
        checkpoints.path(7).rename(checkpoints.path(8))
    else:
        checkpoints.path(7).rename(checkpoints.path(8))
        (checkpoints.path(8) / ("a.pt" if how == "a link" else artifacts.MANIFEST)).unlink()
        if how == "a link":
            (checkpoints.path(8) / "a.pt").symlink_to(checkpoints.path(8) / "b.pt")
    assert checkpoints.steps()[0] == 8 and problem_of(checkpoints, 8) is not None


def test_the_newest_is_by_number_and_latest_is_a_hint(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep_last=3)
    for step in (2, 10, 9):
        write(checkpoints, step)
    assert (
        checkpoints.steps() == [10, 9, 2] and (tmp_path / "latest").read_text() == "step_000009\n"
    )
    assert (
        checkpoints.path(10).stat().st_mode & 0o777 == 0o700
        and (checkpoints.path(10) / "a.pt").stat().st_mode & 0o777 == 0o600
    )


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [6]), (2, None, [6, 5]), (1, 3, [6, 3]), (2, 2, [6, 5, 4, 2])],
)
def test_retention(tmp_path, keep_last, keep_every, left):
    checkpoints = CheckpointFolder(tmp_path, keep_last, keep_every)
    for step in range(1, 7):
        write(checkpoints, step)
    assert checkpoints.steps() == left and not list(tmp_path.glob(".*"))


def test_what_is_set_aside_keeps_its_content_and_never_comes_back(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    for _ in range(3):
        write(checkpoints, 4)
        checkpoints.set_aside(4)
    assert checkpoints.steps() == []
    assert sorted(path.name for path in tmp_path.glob("step*")) == [
        "step_000004.damaged",
        "step_000004.damaged2",
        "step_000004.damaged3",
    ]


def test_a_new_save_removes_what_killed_ones_have_left(tmp_path):
    checkpoints = CheckpointFolder(tmp_path)
    for left in (".step_000003", ".step_000002.old", ".universal_000001"):
        (tmp_path / left).mkdir()
    checkpoints.new_staging(5)
    assert [path.name for path in tmp_path.iterdir()] == [".step_000005"]


@pytest.mark.parametrize("sizes", [[0], [1], [100, 5 << 20, 3], [1 << 20, (1 << 20) - 1]])
def test_the_digest_is_that_of_the_bytes_on_disk(tmp_path, sizes):
    file, parts = (
        HashedFile(tmp_path / "x"),
        [np.random.default_rng(size).bytes(size) for size in sizes],
    )
    for part in parts:
        file.write(memoryview(part))
    entry = file.close()
    content = (tmp_path / "x").read_bytes()
    assert content == b"".join(parts)
    assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_file_that_is_cut_while_it_is_written_is_noticed(tmp_path):
    file = HashedFile(tmp_path / "x")
    file.write(bytes(100))
    os.truncate(tmp_path / "x", 60)
    with pytest.raises(OSError, match="ends after 60 of the 100 bytes written"):
        file.close()
    assert "ends after 60" in str(file.error)


def test_a_file_that_is_let_go_of_leaves_no_thread(tmp_path):
    before = threading.active_count()
    file = HashedFile(tmp_path / "x")
    file.write(bytes(5 << 20))
    file.abandon()
    file.abandon()
    assert threading.active_count() == before


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    (tmp_path / "x").write_text("before")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "x")


def test_space_is_looked_for_on_the_volume_in_question(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(
        ArtifactError, match=r"needs 1,073,741,824\.0 MiB in .*, and its volume has .* MiB free"
    ):
        check_space(tmp_path, 1 << 50)


def test_differences_are_named_with_both_values():
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 2, "c": [1, 2]}, "e": "x"}
    assert provenance.differences(before, now) == [
        "a.b: 1 before, 2 now",
        'e: nothing before, "x" now',
    ]
    assert provenance.differences(json.loads(json.dumps(before)), before) == []
