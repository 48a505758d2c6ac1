"""Trackers: the names and steps of TensorBoard, one run over stops, and never in training's way."""

import importlib.util
import threading
from typing import ClassVar

import pytest
import torch

from sftmix.config.reader import load_config
from sftmix.engine.ranks import Ranks
from sftmix.errors import ConfigError
from sftmix.train import trackers
from sftmix.train.log import SCALARS, RunLog
from sftmix.train.trackers import TrackedStage, Trackers, check_installed, read_state

CONFIG = {"mixup": {"weight": 0.2}, "run": {"seed": 3, "notes": None}}


def stage_in(folder, **changes):
    given = {
        "project": "a project",
        "group": "mine",
        "stage": "train",
        "config": CONFIG,
        "folder": folder / "trackers",
    }
    return TrackedStage(**{**given, **changes})


class Recording:
    """A tracker that keeps what it is given, of all attempts, by id."""

    runs: ClassVar[dict] = {}

    def __init__(self, stage, id):
        self.id = id or f"run-{len(self.runs)}"
        self.points = self.runs.setdefault(self.id, [])

    def log(self, values, step):
        self.points.append((step, dict(values)))

    def finish(self):
        self.points.append("finished")


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recording, "runs", {})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recording)
    return Recording.runs


def test_a_resumed_stage_goes_on_in_its_run_and_sends_no_step_twice(recorded, tmp_path):
    state = tmp_path / "train.json"
    first = Trackers(["wandb"], stage_in(tmp_path), state=state)
    first.start(resumes=False)
    for step in (10, 20, 30):
        assert first.log({"loss/ntp": 1.0 / step}, step) == []
    assert first.finish() == []
    # the last checkpoint was after step 15
    second = Trackers(["wandb"], stage_in(tmp_path), state=state)
    second.start(resumes=True)
    for step in (20, 30, 40):
        second.log({"loss/ntp": 1.0 / step}, step)
    second.finish()
    points = [(step, {"loss/ntp": 1.0 / step}) for step in (10, 20, 30)]
    assert recorded == {
        "run-0": [*points, "finished", (40, {"loss/ntp": 1.0 / 40}), "finished"],
    }
    assert read_state(state) == {"wandb": {"id": "run-0", "step": 40}}
    third = Trackers(["wandb"], stage_in(tmp_path), state=state)
    third.start(resumes=False)
    third.log({"loss/ntp": 1.0}, 10)
    third.finish()
    assert recorded["run-1"] == [(10, {"loss/ntp": 1.0}), "finished"]


@pytest.mark.parametrize("when", ["starts", "logs", "finishes", "hangs"])
def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    when, recorded, monkeypatch, tmp_path
):
    never = threading.Event()

    class Failing(Recording):
        def __init__(self, stage, id):
            if when == "starts":
                raise RuntimeError("no such\naccount")
            self.id = "failing"

        def log(self, values, step):
            if when == "logs":
                raise ConnectionError("the server is gone")

        def finish(self):
            if when == "finishes":
                raise ValueError("no answer")
            if when == "hangs":
                never.wait()

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Failing)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2)
    tracked = Trackers(["mlflow", "wandb"], stage_in(tmp_path), state=tmp_path / "train.json")
    tracked.start(resumes=False)
    said = []
    for step in (1, 2, 3):
        said += tracked.log({"loss/ntp": 1.0}, step)
    said += tracked.finish()
    never.set()
    expected = {
        "starts": "mlflow is left out from here on: RuntimeError: no such.",
        "logs": "mlflow is left out from here on: ConnectionError: the server is gone.",
        "finishes": "mlflow is left out from here on: ValueError: no answer.",
        "hangs": "mlflow has not taken all points within 0 s after the last step.",
    }[when]
    assert len(said) == 1 and said[0].startswith(expected)
    assert [point[0] for point in recorded["run-0"][:-1]] == [1, 2, 3]


def test_curves_have_the_names_and_steps_of_tensorboard(recorded, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(
        "train",
        Ranks(0, 1, 0, torch.device("cpu")),
        metrics=tmp_path / "metrics.jsonl",
        tensorboard=tmp_path / "tb",
        trackers=Trackers(["wandb"], stage_in(tmp_path), state=tmp_path / "train.json"),
        every_steps=1,
        has_mixup=True,
        has_router=False,
    )
    log.start(num_steps=2)
    for step in (1, 2):
        log._write(step, {"step": step, "epoch": 0, **dict.fromkeys(SCALARS, step / 2)})
    log.finish()
    curves = EventAccumulator(str(tmp_path / "tb")).Reload()
    shown = {
        (tag, event.step, event.value)
        for tag in curves.Tags()["scalars"]
        for event in curves.Scalars(tag)
    }
    sent = {
        (tag, step, value)
        for step, values in recorded["run-0"][:-1]
        for tag, value in values.items()
    }
    assert sent == shown and len(sent) == 2 * len(SCALARS)


def test_another_rank_sends_nothing(recorded, tmp_path):
    log = RunLog(
        "train",
        Ranks(1, 2, 1, torch.device("cpu")),
        metrics=tmp_path / "metrics.jsonl",
        tensorboard=None,
        trackers=Trackers(["wandb"], stage_in(tmp_path), state=tmp_path / "train.json"),
        every_steps=1,
        has_mixup=True,
        has_router=False,
    )
    log.start(num_steps=1)
    log.finish()
    assert not recorded


def test_the_project_is_the_configs_or_the_environments(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "of the machine")
    unnamed = stage_in(tmp_path, project=None)
    assert unnamed.project_of("wandb") == "of the machine"
    assert unnamed.project_of("mlflow") == unnamed.project_of("trackio") == "sftmix"
    assert stage_in(tmp_path).project_of("wandb") == "a project"


def test_a_missing_package_and_an_unknown_tracker_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trackers names wandb, which is .*'sftmix\[wandb\]'"):
        check_installed(["wandb"])
    with pytest.raises(ConfigError, match=r"log.trackers.*neptune"):
        load_config("quickstart", ["log.trackers=[neptune]"])


def read_wandb(folder, tracked):
    """Returns the bytes of the offline files: points are in them as text."""
    found = sorted((folder / "trackers/wandb").glob("offline-run-*/*.wandb"))
    content = b"".join(path.read_bytes() for path in found)
    assert all(path.stem == f"run-{tracked['id']}" for path in found)
    return content


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_packages_take_points_and_settings(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    state = tmp_path / "train.json"
    for resumes, steps in ((False, (1, 2)), (True, (2, 3))):
        tracked = Trackers([name], stage_in(tmp_path), state=state)
        tracked.start(resumes=resumes)
        said = []
        for step in steps:
            said += tracked.log({"loss/ntp": step / 4, "grad_norm": float("nan")}, step)
        assert [*said, *tracked.finish()] == []
    known = read_state(state)[name]
    assert known["step"] == 3
    if name == "wandb":
        content = read_wandb(tmp_path, known)
        assert content.count(b"loss/ntp") >= 3 and b"mine/train" in content and b"mixup" in content
    elif name == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient()
        history = client.get_metric_history(known["id"], "loss/ntp")
        assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
        run = client.get_run(known["id"])
        assert run.data.params == {"mixup.weight": "0.2", "run.seed": "3", "run.notes": "None"}
        assert run.info.status == "FINISHED" and run.info.run_name == "mine/train"
    else:
        from trackio.sqlite_storage import SQLiteStorage

        logs = SQLiteStorage.get_logs("a project", known["id"])
        assert [(row["step"], row["loss/ntp"]) for row in logs] == [(1, 0.25), (2, 0.5), (3, 0.75)]
        settings = SQLiteStorage.get_run_config("a project", known["id"])
        assert known["id"].startswith("mine/train-") and settings["run"] == CONFIG["run"]
