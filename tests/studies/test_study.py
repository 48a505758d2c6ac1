"""A study through the command line, on real files and processes."""

import hashlib
import json
import shutil

import pytest
from processes import sftmix
from tiny import TINY

pytestmark = pytest.mark.recipe
ARMS = """
base: quickstart
study:
  dir: DIR
  seeds: 2
  control: ntp
  arms:
    ntp: {mixup: {weight: 0}}
    sftmix: {}
"""


def write(folder, text=ARMS):
    path = folder / "study.yaml"
    path.write_text(text.replace("DIR", str(folder / "study")))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished study, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    done = sftmix("study", str(write(folder)), *TINY)
    return folder, done.stdout


def weights(run):
    return hashlib.sha256((run / "sftmix" / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_table_page_and_figures_agree(finished):
    folder, output = finished
    results = json.loads((folder / "study" / "results.json").read_text())
    control, arm = results["arms"]
    assert (control["arm"], arm["arm"]) == ("ntp", "sftmix") and not results["failed"]
    losses = [[row["seeds"][seed]["loss"] for seed in ("0", "1")] for row in (control, arm)]
    difference = arm["differences"]["loss"]
    assert difference["per_seed"] == pytest.approx(
        [one - other for one, other in zip(losses[1], losses[0], strict=True)]
    )
    page = (folder / "study" / "index.html").read_text()
    for text in (results["sentences"][0], f"{sum(losses[1]) / 2:.4f} ±", "4 of 4 trials finished"):
        assert text in page and (text == "4 of 4 trials finished" or text[:40] in output)
    for trial, loss in (("ntp/seed_0", losses[0][0]), ("sftmix/seed_1", losses[1][1])):
        metrics = folder / "study" / "trials" / trial / "evaluation" / "metrics.json"
        assert json.loads(metrics.read_text())["train"]["loss_nats_per_token"] == loss


def test_what_arms_have_in_common_is_made_once_per_seed(finished):
    trials = finished[0] / "study" / "trials"
    assert finished[1].count("] reference: ") == finished[1].count("] score: ") == 2
    for stage in ("data", "reference", "confidence", "pairing"):
        for seed in (0, 1):
            one, other = (trials / arm / f"seed_{seed}" / stage for arm in ("ntp", "sftmix"))
            files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
            assert files and all((one / name).samefile(other / name) for name in files)
    assert weights(trials / "ntp/seed_0") != weights(trials / "sftmix/seed_0")
    assert weights(trials / "sftmix/seed_0") != weights(trials / "sftmix/seed_1")


def test_a_trial_equals_a_run_of_its_own_bit_for_bit(finished, tmp_path):
    sftmix("run", "quickstart", *TINY, f"run.dir={tmp_path / 'run'}", "run.seed=1")
    assert weights(tmp_path / "run") == weights(finished[0] / "study/trials/sftmix/seed_1")


def test_a_killed_study_goes_on_where_it_was(finished, tmp_path):
    file = write(tmp_path)
    # seed 0: reference and two targets of 8 steps; in the second target
    killed = sftmix("study", str(file), *TINY, check=False, fault="train.step:0:20:kill9")
    assert killed.returncode == -9
    done = sftmix("study", str(file), *TINY)
    assert "trial 1/4: ntp, seed 0: finished before" in done.stdout
    for trial in ("ntp/seed_0", "sftmix/seed_0", "ntp/seed_1", "sftmix/seed_1"):
        assert weights(tmp_path / "study/trials" / trial) == weights(
            finished[0] / "study/trials" / trial
        )
    before, after = (
        json.loads((folder / "study" / "results.json").read_text())["arms"]
        for folder in (finished[0], tmp_path)
    )
    for one, other in zip(before, after, strict=True):
        assert one["differences"] == other["differences"]


@pytest.mark.torture
def test_jobs_side_by_side_give_the_same(finished, tmp_path):
    done = sftmix("study", str(write(tmp_path)), *TINY, "--jobs", "2")
    assert "job 2: seeds 1" in done.stdout and "trial 2/2: sftmix, seed 1" in done.stdout
    before, after = (
        json.loads((folder / "study" / "results.json").read_text())["arms"]
        for folder in (finished[0], tmp_path)
    )
    for one, other in zip(before, after, strict=True):
        assert one["differences"] == other["differences"]
    assert "] train: " in (tmp_path / "study/logs/job_1.log").read_text()


@pytest.mark.torture
def test_jobs_that_are_stopped_say_so_and_go_on(finished, tmp_path):
    file = write(tmp_path)
    # each job sends itself SIGTERM in its fifth step
    stopped = sftmix(
        "study", str(file), *TINY, "--jobs", "2", check=False, fault="train.step:0:5:term"
    )
    assert stopped.returncode == 75 and "the jobs were stopped" in stopped.stderr
    sftmix("study", str(file), *TINY, "--jobs", "2")
    logs = (tmp_path / "study/logs").glob("job_*.log")
    assert all("resumed after step 5" in log.read_text() for log in logs)
    for trial in ("ntp/seed_0", "sftmix/seed_1"):
        assert weights(tmp_path / "study/trials" / trial) == weights(
            finished[0] / "study/trials" / trial
        )


@pytest.mark.torture
def test_a_job_that_fails_is_named(tmp_path):
    hot = "    hot: {train: {learning_rate: 1.0e+30}, limits: {skipped_steps: 1}}\n"
    file = write(tmp_path, ARMS.replace("    sftmix: {}\n", hot))
    done = sftmix("study", str(file), *TINY, "--jobs", "2", check=False)
    assert done.returncode == 2 and "2 jobs failed: 1; 2" in done.stderr
    page = (tmp_path / "study/index.html").read_text()
    assert "hot, seed 0 failed" in page and "hot, seed 1 failed" in page


def test_one_seed_alone_and_a_seed_that_is_not_there(tmp_path):
    file = write(tmp_path)
    done = sftmix("study", str(file), *TINY, "--only-seeds", "1")
    assert "trial 2/2: sftmix, seed 1" in done.stdout and "decides nothing" in done.stdout
    assert not (tmp_path / "study/trials/ntp/seed_0").exists()
    refused = sftmix("study", str(file), *TINY, "--only-seeds", "4", check=False)
    assert refused.returncode == 2 and "--only-seeds 4: the seeds of this study are 0, 1" in (
        refused.stderr
    )


def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path):
    hot = "    hot: {train: {learning_rate: 1.0e+30}, limits: {skipped_steps: 1}}\n"
    text = ARMS.replace("    sftmix: {}\n", hot + "    sftmix: {}\n").replace(
        "seeds: 2", "seeds: 1"
    )
    file = write(tmp_path, text)
    done = sftmix("study", str(file), *TINY, check=False)
    assert done.returncode == 2 and "1 trial failed: hot, seed 0: " in done.stderr
    results = json.loads((tmp_path / "study/results.json").read_text())
    assert [arm["arm"] for arm in results["arms"]] == ["ntp", "sftmix"]
    assert len(results["failed"]) == 1 and "hot, seed 0 failed" in results["failed"][0]
    assert "hot, seed 0 failed" in (tmp_path / "study/index.html").read_text()


def test_another_config_does_not_replace_finished_trials(finished, tmp_path):
    shutil.copytree(finished[0] / "study", tmp_path / "study")
    file = write(tmp_path)
    refused = sftmix("study", str(file), *TINY, "train.learning_rate=0.5", check=False)
    assert refused.returncode == 2 and "train.learning_rate" in refused.stderr
    trial = "study/trials/ntp/seed_0"
    assert weights(tmp_path / trial) == weights(finished[0] / trial)


def test_records_alone_finish_a_study_on_another_machine(finished, tmp_path):
    """The trials of seed 0 came as records, those of seed 1 are run here."""
    for arm in ("ntp", "sftmix"):
        record = f"study/records/{arm}/seed_0.json"
        (tmp_path / record).parent.mkdir(parents=True)
        shutil.copy(finished[0] / record, tmp_path / record)
    done = sftmix("study", str(write(tmp_path)), *TINY)
    assert "trial 2/4: sftmix, seed 0: finished before" in done.stdout
    assert not (tmp_path / "study/trials/ntp/seed_0").exists()
    before, after = (
        json.loads((folder / "study" / "results.json").read_text())
        for folder in (finished[0], tmp_path)
    )
    for one, other in zip(before["arms"], after["arms"], strict=True):
        assert one["differences"] == other["differences"]
        assert one["switched"] == other["switched"]
    page = (tmp_path / "study" / "index.html").read_text()
    assert "trials/sftmix/seed_1" in page and "trials/sftmix/seed_0" not in page


def test_a_record_of_other_settings_counts_only_for_its_own(finished, tmp_path):
    records = tmp_path / "study" / "records"
    shutil.copytree(finished[0] / "study" / "records", records)
    before = (records / "ntp" / "seed_0.json").read_bytes()
    file, changed = str(write(tmp_path)), "train.epochs=2"
    refused = sftmix("study", file, *TINY, changed, check=False)
    assert refused.returncode == 2 and "train.epochs" in refused.stderr
    assert (records / "ntp" / "seed_0.json").read_bytes() == before
    sftmix("study", file, *TINY, changed, "--only-seeds", "0", "--force")
    assert (
        json.loads((records / "ntp/seed_0.json").read_text())["settings"]["train"]["train"][
            "epochs"
        ]
        == 2
    )
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert [list(arm["seeds"]) for arm in results["arms"]] == [["0"], ["0"]]


def test_a_damaged_record_is_named(finished, tmp_path):
    shutil.copytree(finished[0] / "study" / "records", tmp_path / "study" / "records")
    path = tmp_path / "study" / "records" / "ntp" / "seed_0.json"
    path.write_text(path.read_text()[:200])
    refused = sftmix("study", str(write(tmp_path)), *TINY, check=False)
    assert refused.returncode == 2 and str(path) in refused.stderr
