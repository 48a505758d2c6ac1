"""A training run that is stopped, damaged, or moved to other ranks goes on as if nothing had
happened, or says why it does not.

One set of real ranks runs all scenarios of `resume_worker.py`; the oracle is an undisturbed run of
the same build.
"""

import json
from pathlib import Path

import pytest
from processes import run_ranks, sftmix
from tiny import TINY

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture
WORKER = Path(__file__).parent / "resume_worker.py"
NTP = "loss/ntp (nats/token)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the data stage of the tiny recipe."""
    folder = tmp_path_factory.mktemp("resume")
    sftmix("data", "configs/quickstart.yaml", *TINY, f"run.dir={folder}")
    return folder


def outcomes(folder, num_ranks, stage, *scenarios):
    run_ranks(WORKER, num_ranks, str(folder), str(stage), str(folder / "result.json"), *scenarios)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def two_ranks(data):
    return outcomes(data, 2, 3)


def assert_same(outcome, undisturbed):
    assert not any(outcome["errors"]), outcome["errors"]
    assert outcome["lines"] == undisturbed["lines"] and outcome["weights"] == undisturbed["weights"]


def stopped_after(outcome):
    """Returns the step after which a run was stopped, the same on all ranks."""
    assert len(set(outcome["errors"])) == 1 and outcome["errors"][0].startswith(
        "StoppedError: stopped after step "
    ), outcome["errors"]
    return int(outcome["errors"][0].split("stopped after step ")[1].split(":")[0])


@pytest.mark.parametrize(
    "stage", [2, pytest.param(0, marks=TORTURE), pytest.param(1, marks=TORTURE)]
)
def test_resumed_runs_are_undisturbed_ones_for_every_zero_stage(data, stage):
    results = outcomes(data, 1, stage, "undisturbed", "stopped_twice", "in_background")
    assert_same(results["stopped_twice"][-1], results["undisturbed"])
    assert_same(results["in_background"][-1], results["undisturbed"])


def test_a_run_stopped_twice_has_the_losses_and_weights_of_one_that_was_not(two_ranks):
    first, second, last = two_ranks["stopped_twice"]
    # A request on one rank stops all, after the same step; the second stop is in the next epoch.
    assert [stopped_after(first), stopped_after(second)] == [3, 7] and second["steps"][:2] == [7, 6]
    assert_same(last, two_ranks["undisturbed"])
    assert two_ranks["undisturbed"]["lines"][-1]["epoch"] == 1


def test_files_written_in_the_background_hold_the_state_of_their_step(two_ranks):
    first, last = two_ranks["in_background"]
    assert stopped_after(first) == 8 and first["steps"] == [8, 6]
    assert_same(last, two_ranks["undisturbed"])


def test_retention_keeps_the_newest_and_every_fourth(two_ranks):
    assert two_ranks["retention"]["steps"] == [11, 10, 8, 4]


def test_every_damage_is_found_before_use_and_the_checkpoint_before_it_taken(two_ranks):
    assert len(two_ranks["damaged"]) >= 8
    for what, outcome in two_ranks["damaged"].items():
        if what == "manifest.json one short":  # the newline at its end: the content is whole
            assert stopped_after(outcome) == 7
        else:
            assert stopped_after(outcome) == 4, what  # went on after step 3, not 6
            assert "step_000006.damaged" in outcome["left"], what  # set aside, not deleted


@TORTURE
def test_every_damage_of_every_file_is_found(data, monkeypatch):
    monkeypatch.setenv("EVERY_DAMAGE", "1")
    results = outcomes(data, 2, 3, "undisturbed", "two_checkpoints", "damaged")
    test_every_damage_is_found_before_use_and_the_checkpoint_before_it_taken(results)


def test_a_checkpoint_vouches_for_the_outputs_before_it_too(two_ranks):
    assert_same(two_ranks["damaged_output"], two_ranks["undisturbed"])
    assert {"step_000002.damaged", "step_000004.damaged"} <= set(
        two_ranks["damaged_output"]["left"]
    )


def test_hints_junk_clocks_and_swapped_files(two_ranks):
    after = {what: stopped_after(outcome) for what, outcome in two_ranks["hints"].items()}
    assert {step for what, step in after.items() if what.startswith("latest")} == {7}
    assert after["swapped ranks"] == 4 and after["swapped steps"] == 1


def test_a_disk_that_fails_on_one_rank_is_one_error_on_all_and_nothing_is_lost(two_ranks):
    for what, outcome in two_ranks["full_disk"].items():
        if what.endswith("again"):
            assert_same(outcome, two_ranks["undisturbed"])
        else:
            assert len(set(outcome["errors"])) == 1, what
            assert outcome["errors"][0].startswith(
                "ArtifactError: the checkpoint of step 8 could not be"
            ), outcome["errors"]
            assert outcome["steps"] == [6, 3], what
    for action, words in (("enospc", "No space left"), ("edquot", "quota"), ("erofs", "Read-only")):
        message = two_ranks["full_disk"][f"checkpoint.write 1 {action}"]["errors"][0]
        assert (
            words in message
            and "rank 1 on " in message
            and "_states.pt" in message
            and "MiB free" in message
            and "needed" in message
        )


def test_a_real_file_system_that_is_full_leaves_the_checkpoint_before(two_ranks):
    if isinstance(two_ranks["small_disk"], str):
        pytest.skip(two_ranks["small_disk"])
    for tenth in ("2", "5", "8", "0"):
        outcome = two_ranks["small_disk"][tenth]
        message = outcome["errors"][0]
        assert outcome["errors"] == [message] * 2 and outcome["steps"] == [3], outcome["errors"]
        expected = "and its volume has 0." if tenth == "0" else "No space left on device"
        assert (
            message.startswith("ArtifactError: the checkpoint of step 6 could not be")
            and expected in message
        )


def test_short_writes_are_completed(two_ranks):
    first, last = two_ranks["short_writes"]
    assert stopped_after(first) == 4
    assert_same(last, two_ranks["undisturbed"])


def test_a_late_rank_is_waited_for(two_ranks):
    runs = two_ranks["slow_rank"]
    for first, last in (runs[:2], runs[2:]):
        assert stopped_after(first) == 4 and first["steps"] == [4, 2]
        assert_same(last, two_ranks["undisturbed"])


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(two_ranks):
    assert set(two_ranks["other_run"]["errors"]) == {next(iter(two_ranks["other_run"]["errors"]))}
    assert 'settings.learning_rate: "f" before, "g" now' in two_ranks["other_run"]["errors"][0]


def test_nothing_in_a_state_file_is_run(two_ranks):
    assert two_ranks["payload"] == {"refused": "UnpicklingError", "has_run": False}


def test_the_universal_form_loses_no_bit(two_ranks):
    assert_same(two_ranks["as_if_from_other_ranks"], two_ranks["undisturbed"])


def test_names_that_other_nodes_see_later_are_waited_for(two_ranks):
    (first, last), hidden = two_ranks["late_names"]
    assert stopped_after(first) == 3 and ".step_000003" in hidden[0]
    assert_same(last, two_ranks["undisturbed"])


def assert_elastic(data, monkeypatch, *, stage, precision, bound, sizes):
    """Runs on every number of ranks of `sizes` take up what those before it have left; each is held
    against the undisturbed run on as many ranks as it began on, from which only rounding may tell
    it."""
    monkeypatch.setenv("DROPOUT", "0")  # its streams belong to ranks
    monkeypatch.setenv("PRECISION", precision)
    folder = data / f"elastic-{stage}-{precision}"
    folder.mkdir()
    (folder / "data").symlink_to(data / "data")
    undisturbed, differences = {}, {}
    for num_ranks in sizes:
        results = outcomes(
            folder, num_ranks, stage, "undisturbed", "two_checkpoints", "from_other_ranks"
        )
        undisturbed[num_ranks] = results["undisturbed"]["lines"]
        for source, outcome in results["from_other_ranks"].items():
            lines = undisturbed[int(source)]
            assert not any(outcome["errors"]) and [line["step"] for line in outcome["lines"]] == [
                line["step"] for line in lines
            ]
            differences[f"{source} to {num_ranks}"] = max(
                abs(a[NTP] - b[NTP]) for a, b in zip(outcome["lines"], lines, strict=True)
            )
            # lam is a function of the plan alone: the same pairs in the same steps.
            assert [line["mixup/lam (mean)"] for line in outcome["lines"]] == [
                line["mixup/lam (mean)"] for line in lines
            ]
    print(stage, precision, differences)
    assert len(differences) >= len(sizes) and max(differences.values()) <= bound, differences


@pytest.mark.parametrize(
    ("stage", "precision", "bound"),
    [(3, "fp32", 1e-6), pytest.param(3, "bf16", 5e-4, marks=TORTURE)],
)
def test_other_numbers_of_ranks_go_on_with_the_same_examples(
    data, monkeypatch, stage, precision, bound
):
    assert_elastic(
        data, monkeypatch, stage=stage, precision=precision, bound=bound, sizes=(2, 1, 4)
    )


@pytest.fixture
def lora(data, tmp_path, monkeypatch):
    """A folder with the same data for runs with adapters."""
    monkeypatch.setenv("LORA", "1")
    (tmp_path / "data").symlink_to(data / "data")
    return tmp_path


def test_adapters_are_taken_up_to_the_last_bit(lora, monkeypatch):
    # stage and precision of the recipes that fit one GPU; with dropout
    monkeypatch.setenv("PRECISION", "bf16")
    results = outcomes(lora, 1, 1, "undisturbed", "stopped_twice")
    assert_same(results["stopped_twice"][-1], results["undisturbed"])


def test_sharded_adapters_are_taken_up_too_on_other_ranks_but_not_beside_other_weights(
    lora, monkeypatch
):
    monkeypatch.setenv("DROPOUT", "0")  # its streams belong to ranks
    results = outcomes(lora, 2, 3, "undisturbed", "stopped_twice", "two_checkpoints", "other_base")
    assert_same(results["stopped_twice"][-1], results["undisturbed"])
    [message] = set(results["other_base"]["errors"])
    assert (
        message.startswith("ArtifactError: ")
        and "trained beside other weights than those that model.path now has" in message
    )
    [outcome] = outcomes(lora, 1, 3, "from_other_ranks")["from_other_ranks"].values()
    lines = results["undisturbed"]["lines"]
    assert not any(outcome["errors"])
    assert [line[NTP] for line in outcome["lines"]] == [
        pytest.approx(line[NTP], abs=1e-6) for line in lines
    ]
    assert lines[0][NTP] - lines[-1][NTP] > 1e-3  # what was not resumed would show


@TORTURE
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_number_of_ranks_goes_on_after_any_other(data, monkeypatch, stage):
    assert_elastic(
        data, monkeypatch, stage=stage, precision="fp32", bound=1e-6, sizes=(2, 1, 4, 3, 2)
    )
