"""Runs that are asked to stop: each saves what it has, says so by its exit code, and is completed
by the same command."""

import os
import re
import shutil
import signal

import pytest
from reference_runs import (
    PATIENCE,
    assert_completed,
    assert_nothing_left,
    begin,
    reference,
    result_of,
    saved_step,
    wait_for,
)

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture


@pytest.mark.parametrize(
    ("number", "num_ranks"), [(signal.SIGTERM, 2), pytest.param(signal.SIGUSR1, 1, marks=TORTURE)]
)
def test_a_signal_finishes_the_step_saves_and_exits_with_75(folder, undisturbed, number, num_ranks):
    process = begin(folder, num_ranks, "checkpoint.every_steps=")
    wait_for(
        lambda: (
            (folder / "work" / "reference" / "kept" / "metrics.jsonl").exists()
            or process.poll() is not None
        ),
        "the first step",
    )
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == 75
        and output.count("stopped after step ") == 1
        and f"{number.name} was received" in output
    )
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert saved_step(folder) == stopped >= 1  # no step is lost
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@TORTURE
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_sigterm_in_the_middle_of_a_save_loses_nothing(folder, undisturbed, num_ranks):
    done = reference(
        folder, num_ranks, check=False, fault=f"checkpoint.write:{num_ranks - 1}:3:term"
    )
    assert (
        done.returncode == 75 and "SIGTERM was received" in done.stderr and saved_step(folder) >= 1
    )
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@pytest.mark.parametrize(
    ("num_ranks", "times"),
    [
        (1, 1),
        pytest.param(2, 1, marks=TORTURE),
        pytest.param(2, 2, marks=TORTURE),
        pytest.param(1, 2, marks=TORTURE),
    ],
)
def test_control_c_saves_and_exits_with_130_and_a_second_ends_at_once(
    folder, undisturbed, num_ranks, times
):
    # a script in the background has it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = begin(folder, num_ranks, fault="train.step:0:4:sleep")
    signal.signal(signal.SIGINT, before)
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=PATIENCE)
    if times == 1:
        assert (
            process.returncode == 130
            and output.count("stopped after step ") == 1
            and "SIGINT was received" in output
        )
        assert saved_step(folder) == int(re.search(r"stopped after step (\d+)", output)[1])
        assert "the same command resumes from here" in output
    else:
        assert process.returncode in (130, -signal.SIGINT), output
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


def test_a_second_sigterm_ends_at_once(folder):
    # It sends the first to itself in step 3, and goes no further.
    process = begin(
        folder, 1, "checkpoint.every_steps=", fault="train.step:0:3:term,train.step:0:3:hold"
    )
    wait_for(
        lambda: "SIGTERM again ends at once" in process.stdout.readline(), "the answer to the first"
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGTERM and saved_step(folder) == 0


def test_the_wall_clock_limit_saves_and_exits_with_75(folder, undisturbed):
    done = reference(
        folder, 1, "limits.wall_clock_minutes=0.001", "checkpoint.every_steps=", check=False
    )
    assert done.returncode == 75 and "limits.wall_clock_minutes (0.001) is over" in done.stderr
    assert_completed(folder, undisturbed, 1)


def test_going_on_with_other_threads_is_said_and_the_same_to_rounding(folder, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "other")
    reference(tmp_path / "other", 1, "engine.num_threads=1")
    reference(folder, 1, "engine.num_threads=1", check=False, fault="train.step:0:5:kill9")
    again = reference(folder, 1, "engine.num_threads=3")
    said = "not bit for bit: 3 CPU threads per rank, 1 when it was saved"
    assert "resumed after step 4" in again.stdout and said in again.stdout
    found, expected = (result_of(each)[0] for each in (folder, tmp_path / "other"))
    assert found == [pytest.approx(line, rel=1e-5) for line in expected]
