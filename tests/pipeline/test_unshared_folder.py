"""What is refused, and what is fallen back on, where nodes have disks of their own. Runs of that
kind are in tests/multinode."""

import json
from dataclasses import asdict, dataclass

import pytest
import torch

from sftmix.confidence.units import UnitFolder
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.pipeline import unshared_folder
from sftmix.storage import artifacts
from sftmix.storage.checkpoints import STAGE, CheckpointFolder
from sftmix.train.resuming import CheckpointReader


@dataclass(frozen=True)
class TwoDisks(Ranks):
    """Rank 0 of two that share nothing. others: what rank 1 says each time that texts are
    gathered."""

    others: tuple[str, ...] = ()

    def gather_texts(self, text):
        said = list(self.others)
        object.__setattr__(self, "others", tuple(said[1:]))
        return [text, said[0] if said else ""]

    def barrier(self):
        pass


def two_disks(*others):
    return TwoDisks(0, 2, 0, torch.device("cpu"), (0, 1), others)


def reader_of(ranks, folder):
    identity = {"stage": STAGE, "fingerprint": "f", "settings": {}, "inputs": {}}
    checkpoints = CheckpointFolder(folder / "checkpoints", keep_last=1)
    return CheckpointReader(ranks, checkpoints, folder / "kept", identity)


def save(folder, step, **facts):
    checkpoints = CheckpointFolder(folder / "checkpoints", keep_last=9)
    manifest = artifacts.Manifest(
        STAGE, "f", {}, {}, {}, {"step": step, "numbers": {}, "kept": {}, **facts}
    )
    checkpoints.publish(checkpoints.new_staging(step), step, manifest)


def disk(*steps, is_new=False):
    return json.dumps({"host": "node1", "is_new": is_new, "steps": list(steps)})


def test_a_checkpoint_counts_if_every_disk_has_its_part(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert reader_of(two_disks(disk(2, 1)), tmp_path).newest() == 2
    assert (
        tmp_path / "checkpoints" / "step_000003.damaged"
    ).is_dir() and "not every node has its part" in capsys.readouterr().out


def test_a_node_that_had_no_part_in_what_was_saved_is_refused_by_name(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(
        ArtifactError,
        match=(
            r"on node1 has no part of the training state.*Run on the same nodes, in the same order"
        ),
    ) as raised:
        reader_of(two_disks(disk(is_new=True)), tmp_path).newest()
    assert raised.value.on_all_ranks and (tmp_path / "checkpoints" / "step_000001").is_dir()


def test_before_the_first_checkpoint_nothing_is_refused(tmp_path):
    assert reader_of(two_disks(disk(is_new=True)), tmp_path).newest() == 0


@pytest.mark.parametrize(
    "facts",
    [{"storage": [0, 1], "leader": 1}, {"storage": [], "leader": 0}, {}],
    ids=["other order", "was shared", "older program"],
)
def test_state_of_another_layout_is_refused(tmp_path, facts):
    save(tmp_path, 1, **facts)
    with pytest.raises(
        ArtifactError,
        match=(
            r"holds the part of other ranks, or was saved with a run\.dir that was shared otherwise"
        ),
    ):
        reader_of(two_disks(), tmp_path).find_problem(1)


def test_state_of_this_layout_is_taken(tmp_path):
    save(tmp_path, 1, storage=[0, 1], leader=0)
    assert reader_of(two_disks(), tmp_path).find_problem(1) is None


def test_a_problem_of_another_rank_is_raised_here_too():
    with pytest.raises(ArtifactError, match="the disk of node1 is full") as raised:
        unshared_folder.agree(two_disks("the disk of node1 is full"), "")
    assert raised.value.on_all_ranks


def test_a_folder_that_differs_from_the_manifest_is_not_taken_for_a_copy(tmp_path):
    with artifacts.publish(tmp_path / "data", stage="data", settings={}) as staging:
        (staging / "a").write_text("content")
    manifest = artifacts.read_manifest(tmp_path / "data")
    (tmp_path / "data" / "a").write_text("changed")
    assert not unshared_folder._has(tmp_path / "data", manifest)
    (tmp_path / "data" / "a").write_text("content")
    assert not unshared_folder._has(
        tmp_path / "data",
        artifacts.Manifest(**{**asdict(manifest), "fingerprint": "of other settings"}),
    )
    assert unshared_folder._has(tmp_path / "data", manifest)


def test_units_from_two_disks_are_written_once_and_exactly(tmp_path):
    class WithRows(TwoDisks):
        def gather_rows(self, rows):
            theirs = torch.tensor(
                [[1, 0.1, 2], [1, 1e-300, 0], [1, 9.0, 9], [1, 9.0, 9]], dtype=torch.float64
            )  # the second: another disk's
            return torch.cat([rows, theirs])

        def from_main(self, values):
            return values

    shards = UnitFolder(tmp_path, "f")
    unshared_folder.collect_units(WithRows(0, 2, 0, torch.device("cpu"), (0, 1)), shards, [2, 2])
    assert shards.problem(0, 2) == "not scored yet" and shards.problem(1, 2) is None
    assert shards.read(1).nll_sum.tolist() == [0.1, 1e-300] and shards.read(
        1
    ).num_misses.tolist() == [2, 0]
