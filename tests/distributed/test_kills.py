"""Runs that are killed, by SIGKILL, at every place where it may hurt: each leaves no process
behind, and is completed by the same command with the losses and weights of a run that nothing
disturbed."""

import os
import random
import signal
import time
from functools import partial

import pytest
from reference_runs import (
    MAIN_ONLY,
    PATIENCE,
    SITES,
    assert_completed,
    assert_nothing_left,
    begin,
    pids_of,
    processes_of,
    ranks_of,
    reference,
    result_of,
    saved_step,
    wait_for,
)

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture


def assert_survives_kill(folder, undisturbed, site, *, rank, hit, num_ranks):
    if site == "resume.load":
        reference(folder, num_ranks, check=False, fault="train.step:0:4:kill9")
    for _ in range(5 if site == "resume.load" else 1):  # killed while it resumes, again and again
        done = reference(folder, num_ranks, check=False, fault=f"{site}:{rank}:{hit}:kill9")
        assert done.returncode != 0, f"{site} was not reached:\n{done.stdout[-1500:]}"
        assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@pytest.mark.parametrize("site", ["checkpoint.manifest", "checkpoint.rename", "publish.rename"])
def test_killed_between_the_moves_of_a_save(folder, undisturbed, site):
    assert_survives_kill(
        folder, undisturbed, site, rank=0, hit=1 if site.startswith("publish") else 2, num_ranks=1
    )


@TORTURE
@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_killed_at_every_site_on_every_rank(folder, undisturbed, site, rank, hit):
    if (rank == 1 and site.startswith(MAIN_ONLY)) or (
        site.startswith(("publish", "resume")) and hit == 2
    ):
        pytest.skip("rank 0 alone passes there, or once")
    assert_survives_kill(folder, undisturbed, site, rank=rank, hit=hit, num_ranks=2)


@TORTURE
@pytest.mark.parametrize("number", range(25))
def test_killed_at_random(folder, undisturbed, number):
    """A rank, all ranks, the launcher or the command is killed at a random moment, until the run is
    done."""
    rng = random.Random(number)
    for _ in range(4):
        process = begin(folder, 2)
        is_over = partial(lambda started: started.poll() is not None, process)
        victim = rng.choice(["rank", "ranks", "launcher.launch", "sftmix.cli"])
        wait_for(lambda is_over=is_over: len(ranks_of(folder)) == 2 or is_over(), "start")
        deadline = time.monotonic() + rng.uniform(0, 14)
        while time.monotonic() < deadline and not is_over():
            time.sleep(0.01)
        pids = ranks_of(folder) if victim.startswith("rank") else pids_of(folder, victim)
        for pid in rng.sample(pids, min(1, len(pids))) if victim == "rank" else pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert_nothing_left(folder)
        if process.returncode == 0:
            break
    if not (folder / "reference").exists():
        assert_completed(folder, undisturbed, 2)
    assert result_of(folder) == undisturbed(2)


@TORTURE
@pytest.mark.parametrize("site", ["resume.convert", "resume.converted"])
def test_killed_while_it_converts_for_other_ranks(folder, undisturbed, site):
    reference(folder, 2, check=False, fault="train.step:0:4:kill9")
    assert reference(folder, 1, check=False, fault=f"{site}:0:1:kill9").returncode != 0
    again = reference(folder, 1)
    assert "resumed after step 3" in again.stdout and not list((folder / "work").glob("*"))
    for (step, loss, _), (expected_step, expected, _) in zip(
        result_of(folder)[0], undisturbed(2)[0], strict=True
    ):
        assert step == expected_step and abs(loss - expected) <= 1e-6


def lock_of(folder):
    return next((folder / "extensions").rglob("lock"), None)


@TORTURE
def test_killed_while_an_extension_is_built(folder):
    """DeepSpeed's Adam for offloaded optimisers is compiled at the first start; the lock of a build
    that was killed is not waited for."""
    offload = ["engine.deepspeed=configs/deepspeed/zero3_offload.json"]
    process = begin(folder, 1, *offload)
    wait_for(lambda: lock_of(folder) is not None or process.poll() is not None, "the build")
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert lock_of(folder) is not None
    reference(folder, 1, *offload)
    assert lock_of(folder) is None


@pytest.mark.parametrize(
    "victim",
    [
        "launcher.launch",
        pytest.param("sftmix.cli", marks=TORTURE),
    ],
)
def test_no_rank_outlives_its_launcher(folder, undisturbed, victim):
    process = begin(folder, 2, fault="train.step:0:4:sleep")  # it is not over before it is killed
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    victims = pids_of(folder, victim)
    assert victims, processes_of(folder)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0  # DeepSpeed's launcher itself ends with 0 when it is killed
    assert_nothing_left(folder)
    assert not (folder / "reference").exists()  # the ranks ended, rather than go on to the end
    assert_completed(folder, undisturbed, 2)
