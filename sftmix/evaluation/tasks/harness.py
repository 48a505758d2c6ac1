"""Runs tasks through lm-evaluation-harness: its definitions, its model classes, its metrics."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.data.tokenizer import NOT_LOADED
from sftmix.errors import ArtifactError, ConfigError, first_line
from sftmix.evaluation.models import not_a_model
from sftmix.evaluation.tasks.formats import LocalTask
from sftmix.storage.files import write_text

MISSING = (
    "lm-evaluation-harness is not installed, which `sftmix tasks` runs. Install it:"
    " pip install 'sftmix[eval]'."
)


@dataclass(frozen=True)
class Options:
    """How a task is run. limit: most questions of a task; None for all. shots: examples before the
    question; None for the task's own number. batch_size: requests per forward, or "auto".
    backend: a model class of the harness. model_args: further arguments of it."""

    limit: int | None
    shots: int | None
    chat_template: bool
    batch_size: str
    backend: str
    model_args: Mapping[str, Any]

    def as_settings(self) -> dict[str, Any]:
        """Returns what changes the figures; the size of a batch does not, rounding aside."""
        return {
            "limit": self.limit,
            "shots": self.shots,
            "chat_template": self.chat_template,
            "backend": self.backend,
            "model_args": dict(self.model_args),
            "lm_eval": version(),
        }


def version() -> str:
    """Returns the version of the harness. Raises ConfigError if it is not installed."""
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(MISSING) from None


def write_task(task: LocalTask, folder: Path, examples: LocalTask | None) -> Path:
    """Writes a task's rows, and a definition that includes the harness's own. Returns the
    definition's file, which the harness takes in place of a name.

    examples: rows to draw the examples before a question from; None for none, whatever the
    harness's definition says.
    """
    import lm_eval
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    files = {"test": task.rows}
    if examples is not None:
        files["train"] = examples.rows
    for name, rows in files.items():
        write_text(folder / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    drawn = "train" if examples is not None else None
    definition = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / task.include),
        "task": task.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {name: str((folder / f"{name}.jsonl").resolve()) for name in files}
        },
        "training_split": drawn,
        "fewshot_split": drawn,
        "validation_split": None,
        "test_split": "test",
        **task.changes,
        **({"num_fewshot": 0} if examples is None else {}),
    }
    path = folder / "task.yaml"
    write_text(path, yaml.safe_dump(definition, sort_keys=False))
    return path


class Harness:
    """One model, loaded once for all its tasks."""

    def __init__(self, source: str, options: Options):
        version()
        from lm_eval.api.registry import get_model

        self._options = options
        arguments: dict[str, Any] = {"pretrained": source, "dtype": "auto"}
        if options.backend == "hf":
            import torch

            # without a name the harness takes `cuda`, also where there is none
            arguments["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        arguments |= options.model_args
        try:
            self._model = get_model(options.backend).create_from_arg_obj(
                arguments, {"batch_size": options.batch_size}
            )
        except NOT_LOADED as error:
            raise not_a_model(source, error) from None

    def measure(self, task: str, cache: Path) -> dict[str, dict[str, Any]]:
        """Returns the results of a task by name; a group of the harness has several.

        task: a definition's file, or a name of the harness. cache: answers as they come are kept
        under this name, so that a killed run repeats one batch at most.

        A result: `metrics` {name: {"value", "is_better": 1 or -1}}, as the harness gives them;
        `items` [{"item", metric: number, ...}], a row per question.
        Raises ConfigError for a name that the harness does not know.
        """
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        is_local = task.endswith(".yaml")
        manager = TaskManager(include_defaults=not is_local)  # reading all of them takes seconds
        if not is_local and task not in manager.all_tasks:
            raise ConfigError(
                f"--tasks {task}: the harness knows no task of this name (`lm_eval ls tasks` lists"
                " them). A local file is given as name=FILE."
            )
        try:
            found = simple_evaluate(
                model=self._model,
                tasks=[task],
                num_fewshot=self._options.shots,
                limit=self._options.limit,
                apply_chat_template=self._options.chat_template,
                use_cache=str(cache),
                bootstrap_iters=0,
                log_samples=True,
                task_manager=manager,
            )
        except (ConnectionError, OSError) as error:
            raise ConfigError(
                f"--tasks {task}: its data cannot be loaded: {first_line(error)}"
            ) from None
        assert found is not None  # it is, on other ranks of the harness's own launcher
        return {name: _result(name, found) for name in found["samples"]}


def _result(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    values, better = found["results"][name], found["higher_is_better"].get(name, {})
    metrics = {
        key: {"value": value, "is_better": 1 if better.get(key.split(",")[0], True) else -1}
        for key, value in values.items()
        if isinstance(value, int | float) and not key.startswith("sample_") and "," in key
        if "_stderr" not in key
    }
    items: dict[int, dict[str, Any]] = {}
    for sample in found["samples"][name]:
        document = sample["doc"]
        item = items.setdefault(sample["doc_id"], {"item": document.get("item", sample["doc_id"])})
        for metric in sample["metrics"]:
            if isinstance(sample.get(metric), int | float):
                item[f"{metric},{sample['filter']}"] = float(sample[metric])
        item.setdefault("target", sample["target"])
        item.setdefault("answers", {})[sample["filter"]] = sample["filtered_resps"]
    rows = [items[number] for number in sorted(items)]
    for key, metric in metrics.items():
        given = [row[key] for row in rows if key in row]
        metric["is_mean"] = len(given) == len(rows) and math.isclose(
            sum(given) / len(given), metric["value"], abs_tol=1e-9
        )
    if not any(metric["is_mean"] for metric in metrics.values()):
        # every comparison by question stands on this
        raise ArtifactError(
            f"{name}: no metric of the harness is the mean over its questions, so models cannot be"
            " compared question by question. Run this task with lm_eval itself."
        )
    return {
        "version": found["versions"].get(name),
        "shots": found["n-shot"].get(name),
        "num_items": len(rows),
        "metrics": metrics,
        "items": rows,
    }
