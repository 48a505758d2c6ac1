"""The points of a training stage in W&B, MLflow and trackio, beside TensorBoard.

One run of a tracker per stage, in a group named after the run folder, with the config as its
hyper-parameters. Names of curves and steps are TensorBoard's. A resumed stage goes on in the run
that it has begun, and no step is sent twice.

Training never waits for a tracker: each has a thread of its own. One that fails is named once and
left out from then on.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sftmix.errors import ConfigError, first_line
from sftmix.storage.files import write_text

# where a user names the project of all runs on a machine
PROJECTS = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
FINISH_SECONDS = 60.0  # for the points that are still on their way when a stage ends
_END = None


@dataclass(frozen=True)
class TrackedStage:
    """project: name of the project or experiment; None for the environment's, or `sftmix`. group:
    of the run's stages. config: settings, nested. folder: for files that a tracker writes beside a
    run."""

    project: str | None
    group: str
    stage: str
    config: Mapping[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.group}/{self.stage}"

    def project_of(self, tracker: str) -> str:
        return self.project or os.environ.get(PROJECTS.get(tracker, ""), "") or "sftmix"


class Tracker(Protocol):
    """id: by which a later attempt finds the run."""

    id: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class _WandB:
    name = "wandb"

    def __init__(self, stage: TrackedStage, id: str | None):
        import wandb

        self.id = id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=stage.project_of(self.name),
            group=stage.group,
            name=stage.name,
            job_type=stage.stage,
            config=dict(stage.config),
            dir=str(stage.folder),
            id=self.id,
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


class _MLflow:
    name = "mlflow"

    def __init__(self, stage: TrackedStage, id: str | None):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        project = stage.project_of(self.name)
        if id is None:
            found = self._client.get_experiment_by_name(project)
            experiment = (
                self._client.create_experiment(project) if found is None else found.experiment_id
            )
            tags = {"group": stage.group, "stage": stage.stage}
            run = self._client.create_run(experiment, run_name=stage.name, tags=tags)
            id = run.info.run_id
            params = [Param(key, value) for key, value in flat(stage.config).items()]
            for start in range(0, len(params), 100):  # the most of one request
                self._client.log_batch(id, params=params[start : start + 100])
        else:
            self._client.update_run(id, status="RUNNING")
        self.id = id

    def log(self, values: Mapping[str, float], step: int) -> None:
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self.id, metrics=points)

    def finish(self) -> None:
        self._client.set_terminated(self.id)


class _Trackio:
    name = "trackio"

    def __init__(self, stage: TrackedStage, id: str | None):
        import trackio

        self.id = id or stage.name + "-" + uuid.uuid4().hex[:6]  # runs are found by name
        self._run = trackio.init(
            project=stage.project_of(self.name),
            group=stage.group,
            name=self.id,
            config=dict(stage.config),
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def finish(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Any]] = {kind.name: kind for kind in (_WandB, _MLflow, _Trackio)}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns `section.key` to the text of each value."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value)
    return found


class Trackers:
    """The trackers of one stage, on rank 0. state: file with the runs' ids and the last step that
    each was given."""

    def __init__(self, names: Sequence[str], stage: TrackedStage, *, state: Path):
        self._names, self._stage, self._state = names, stage, state
        self._senders: list[_Sender] = []
        self._saving = threading.Lock()

    def start(self, *, resumes: bool) -> None:
        """Begins a run of each tracker; where the stage resumes, the run that it had."""
        known = read_state(self._state) if resumes else {}
        self._stage.folder.mkdir(parents=True, exist_ok=True)
        self._senders = [
            _Sender(name, self._stage, known.get(name, {}), self._save) for name in self._names
        ]
        self._save()

    def log(self, values: Mapping[str, float], step: int) -> list[str]:
        """Hands the points of a step on. Returns what is to be said of trackers that failed."""
        for sender in self._senders:
            sender.send(dict(values), step)
        return self._failures()

    def finish(self) -> list[str]:
        """Waits for points that are on their way, for at most `FINISH_SECONDS`; returns as
        `log`."""
        for sender in self._senders:
            sender.end()
        for sender in self._senders:
            sender.wait(FINISH_SECONDS)
        return self._failures()

    def _failures(self) -> list[str]:
        failed = [sender for sender in self._senders if sender.said and not sender.is_told]
        for sender in failed:
            sender.is_told = True
        return [sender.said for sender in failed]

    def _save(self) -> None:
        with self._saving:
            known = {sender.name: sender.known for sender in self._senders if sender.known}
            write_text(self._state, json.dumps(known))


class _Sender:
    """A tracker and its thread. known: `id` and `step`, as in the state. said: why it failed."""

    def __init__(self, name: str, stage: TrackedStage, known: dict[str, Any], save: Any):
        self.name, self.known, self.said, self.is_told = name, dict(known), "", False
        self._stage, self._save = stage, save
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, values: dict[str, float], step: int) -> None:
        self._queue.put((values, step))

    def end(self) -> None:
        self._queue.put(_END)

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self.said = (
                f"{self.name} has not taken all points within {seconds:.0f} s after the last step."
                " TensorBoard and metrics.jsonl have them."
            )

    def _work(self) -> None:
        try:
            tracker: Tracker = TRACKERS[self.name](self._stage, self.known.get("id"))
            self.known["id"] = tracker.id
            self._save()
            while (item := self._queue.get()) is not _END:
                values, step = item
                if step > self.known.get("step", 0):  # a resumed stage repeats steps
                    tracker.log(values, step)
                    self.known["step"] = step
                    self._save()
            tracker.finish()
        except Exception as error:  # any failure of a tracker; training goes on
            self.said = (
                f"{self.name} is left out from here on: {type(error).__name__}: {first_line(error)}"
                " TensorBoard and metrics.jsonl have its points."
            )


def read_state(path: Path) -> dict[str, dict[str, Any]]:
    """Returns what `Trackers` saved; nothing where there is no file, or a damaged one."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is missing."""
    from importlib.util import find_spec

    if missing := [name for name in names if find_spec(name) is None]:
        raise ConfigError(
            f"log.trackers names {', '.join(missing)}, which is not installed. Run `pip install"
            f" 'sftmix[{','.join(missing)}]'`, or leave it out."
        )
