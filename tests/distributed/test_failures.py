"""A rank that dies, hangs, raises or leaves: it is named with its cause, the others end with it,
nothing is left behind, and the same command completes the run with the losses and weights of a run
that nothing disturbed."""

import json
import re
import shutil

import pytest
from processes import sftmix, sftmix_on_ranks
from reference_runs import (
    MAIN_ONLY,
    OPTIONS,
    QUICKSTART,
    SITES,
    assert_completed,
    assert_nothing_left,
    reference,
    result_of,
)
from tiny import TINY

from sftmix.train.log import read_metrics

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture


def test_a_rank_that_is_killed_is_named_and_the_others_stop(folder, undisturbed):
    done = reference(folder, 2, check=False, fault="train.step:1:4:kill9")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert (
        len(
            re.findall(
                r"error: rank 1 \(\S+, pid \d+\) died in reference(?:, step [1-4])?\.", output
            )
        )
        == 1
    ), output[-3000:]
    # the first cause, and no other
    assert "Connection closed by peer" not in output and "error: rank 0" not in output
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@pytest.mark.parametrize("action", ["stop", pytest.param("hold", marks=TORTURE)])
def test_a_rank_that_hangs_is_named_and_stacks_are_written(folder, undisturbed, action):
    done = reference(folder, 2, check=False, fault=f"train.step:1:4:{action}")
    output = done.stdout + done.stderr
    assert (
        done.returncode not in (0, 2, 75)
        and len(re.findall(r"error: rank 1 \(\S+, pid \d+\) has not answered for 5 s", output)) == 1
    )
    stacks = (folder / "logs" / "stacks" / "rank_0001.txt").read_text()
    assert "faults.py" in stacks and "loop.py" in stacks
    assert (folder / "logs" / "stacks" / "rank_0000.txt").read_text()
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@TORTURE
def test_a_rank_that_is_late_is_no_alarm(folder, undisturbed, monkeypatch):
    monkeypatch.setenv("SFTMIX_FAULT_SECONDS", "4")
    # 8 steps, each later than the limit allows for a heartbeat minus one
    reference(folder, 2, fault="train.step:1:*:sleep")
    assert result_of(folder) == undisturbed(2)


@pytest.mark.parametrize(
    "action",
    [
        pytest.param("exit0", marks=TORTURE),
        pytest.param("leave", marks=TORTURE),
        pytest.param("raise", marks=TORTURE),
        pytest.param("segfault", marks=TORTURE),
        pytest.param("abort", marks=TORTURE),
    ],
)
def test_a_rank_that_leaves_is_no_success(folder, undisturbed, action):
    done = reference(folder, 2, check=False, fault=f"train.step:1:4:{action}")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert "error: rank 1 (" in output and (
        "RuntimeError: fault injected at train.step" in output
    ) == (action == "raise")
    assert action != "raise" or ") failed in reference, step 3: " in output  # before the fourth
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@TORTURE
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_an_error_anywhere_on_one_rank_ends_all_with_its_cause(folder, undisturbed, site, rank):
    if rank == 1 and site.startswith(MAIN_ONLY):
        pytest.skip("rank 0 alone passes there")
    if site == "resume.load":
        reference(folder, 2, check=False, fault="train.step:0:4:kill9")
    done = reference(folder, 2, check=False, fault=f"{site}:{rank}:1:raise")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert (
        output.count(f"error: rank {rank} (") == 1
        and f"RuntimeError: fault injected at {site}" in output
    )
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


def score(folder, **options):
    return sftmix(
        "score",
        QUICKSTART,
        *OPTIONS,
        "confidence.unit_examples=8",
        f"run.dir={folder}",
        "engine.num_processes=2",
        **options,
    )


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Returns a folder with a finished reference run, and the table of scores that an undisturbed
    run of two ranks makes of it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, folder)
    reference(folder, 2)
    other = folder.parent / "undisturbed"
    shutil.copytree(folder, other)
    score(other)
    return folder, (other / "confidence" / "confidence.parquet").read_bytes()


@TORTURE
@pytest.mark.parametrize(
    ("site", "rank"), [("shard.write", 1), ("shard.rename", 0), ("publish.manifest", 0)]
)
def test_a_rank_that_hangs_while_it_scores_or_merges_is_named(trained, tmp_path, site, rank):
    folder, expected = tmp_path / "run", trained[1]
    shutil.copytree(trained[0], folder)
    fault = f"{site}:{rank}:1:stop"
    # ranks take units as they are free: the other one is slow, so that this one gets some
    if site.startswith("shard"):
        fault += f",score.forward:{1 - rank}:*:sleep"
    done = score(folder, check=False, fault=fault)
    assert done.returncode not in (0, 2, 75)
    assert (
        len(
            re.findall(
                rf"error: rank {rank} \(\S+, pid \d+\) has not answered for 5 s",
                done.stdout + done.stderr,
            )
        )
        == 1
    )
    assert "faults.py" in (folder / "logs" / "stacks" / f"rank_000{rank}.txt").read_text()
    assert_nothing_left(folder)
    score(folder)
    assert (folder / "confidence" / "confidence.parquet").read_bytes() == expected


@TORTURE
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_in_a_save_is_named(folder, undisturbed, rank):
    done = reference(folder, 2, check=False, fault=f"checkpoint.flush:{rank}:2:stop")
    assert (
        done.returncode not in (0, 2, 75) and f"error: rank {rank} (" in done.stdout + done.stderr
    )
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


def test_a_gradient_that_is_not_finite_is_skipped_by_all_named_and_ends_the_run_if_it_goes_on(
    folder,
):
    """The embedding of one token is NaN: the micro-batches that hold it, on one rank or another,
    spoil the step of all."""
    from safetensors.torch import load_file, save_file

    untied = "model.architecture=" + next(
        o for o in TINY if o.startswith("model.architecture=")
    ).split("=", 1)[1].replace("true", "false")
    reference(folder, 1, untied)
    broken = folder / "broken"
    shutil.copytree(folder / "reference" / "checkpoints" / "step_000008", broken)
    weights = load_file(broken / "model.safetensors")
    import datasets

    rows = datasets.Dataset.from_file(str(folder / "data" / "train.arrow"))
    counts = {}
    for ids in rows["input_ids"]:
        for token in set(ids):
            counts[token] = counts.get(token, 0) + 1
    token = min(counts, key=lambda t: (abs(counts[t] - 6), t))
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    holders = {row["example_id"] for row in rows if token in row["input_ids"]}
    model = [
        "model={path: " + str(broken) + "}",
        "limits.skipped_steps=100",
        "train.micro_batch_tokens=40",
    ]
    options = [*OPTIONS, f"run.dir={folder}", *model, "--force"]
    done = sftmix_on_ranks(2, "reference", QUICKSTART, *options)
    written = [
        json.loads(line)
        for line in (folder / "reference" / "skipped_steps.jsonl").read_text().splitlines()
    ]
    assert written and {line["not_finite"] for line in written} == {"loss"}
    named = {i for line in written for i in line["example_ids"]}
    # their micro-batches, and not the whole step
    assert holders <= named and len(named) < len(rows)
    last = read_metrics(folder / "reference" / "metrics.jsonl")[-1]
    assert (
        last["steps/skipped (steps)"]
        == len(written)
        == done.stdout.count("skipped: the loss is not finite")
    )
    changed = ["train.learning_rate=3e-2", "limits.skipped_steps=1"]
    refused = sftmix_on_ranks(2, "reference", QUICKSTART, *options, *changed, check=False)
    assert refused.returncode == 2 and refused.stdout.count("no gradient was finite from step") == 1


@pytest.mark.parametrize("num_ranks", [pytest.param(1, marks=TORTURE), 2])
def test_an_export_that_cannot_be_written_is_one_line_on_all_ranks(folder, undisturbed, num_ranks):
    done = reference(folder, num_ranks, check=False, fault="export.write:0:1:enospc")
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if "sftmix: error: " in line]
    # the launcher has exit codes of its own
    assert done.returncode == 2 or num_ranks == 2, output[-3000:]
    assert len(lines) == 1 and "Traceback" not in output, output[-3000:]
    assert (
        "the model could not be exported: " in lines[0]
        and "No space left on device (" in lines[0]
        and "MiB needed)" in lines[0]
    )
    # no half of a model
    assert not list((folder / "work" / "reference" / "kept").glob("checkpoints/*"))
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@TORTURE
def test_a_disk_that_is_full_on_one_rank_is_one_line_of_that_rank(folder):
    done = reference(folder, 2, check=False, fault="train.step:1:2:enospc")
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if "sftmix: error: " in line]
    assert len(lines) == 1 and "Traceback" not in output, output[-3000:]
    assert re.search(
        r"rank 1 \(\S+, pid \d+\) failed in reference.*: No space left on device \(.* MiB free\)\."
        r" Free some space",
        lines[0],
    )
    assert_nothing_left(folder)
