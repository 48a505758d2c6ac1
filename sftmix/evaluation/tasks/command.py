"""`sftmix tasks`: several models on several tasks, resumed where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import random
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError, ConfigError
from sftmix.evaluation.models import NamedModel, digest_of, is_run_folder, models_of
from sftmix.evaluation.page import aligned, markdown
from sftmix.evaluation.tasks.comparison import differences, note, table
from sftmix.evaluation.tasks.formats import LocalTask, read_task
from sftmix.evaluation.tasks.harness import Harness, Options, version, write_task
from sftmix.storage import provenance
from sftmix.storage.files import read_record, write_json, write_text

RESULTS = "results.json"
FOLDER = "tasks"  # of a run folder, where its own models are measured
DEFINITIONS = "definitions"  # what the harness reads: rows and task files
WIDTH = 100


def run_tasks(options: argparse.Namespace) -> None:
    """Measures what is missing, writes results.json and results.md, and prints the table.

    A result that is there and was made with the same model, questions and settings is not made
    again. Raises ArtifactError if it was made with others, unless options.force; ConfigError and
    DataError for what cannot be measured.
    """
    version()  # first: without the harness nothing works
    folder = _folder(options)
    models = models_of(options.models)
    tasks = _tasks(options)
    how = Options(
        limit=options.limit,
        shots=options.shots,
        chat_template=options.chat_template,
        batch_size=options.batch_size,
        backend=options.backend,
        model_args=dict(options.model_args),
    )
    digests = {model.name: digest_of(model.source) for model in models}
    wanted = {
        (model, name): {
            "model": digests[model.name],
            "task": content,
            **how.as_settings(),
        }
        for model in models
        for name, (_, _, content) in tasks.items()
    }
    missing = [key for key, settings in wanted.items() if not _is_there(folder, *key, settings)]
    if not options.force:
        _refuse_other(folder, missing, wanted)
    _measure(folder, missing, wanted, tasks, how)
    _conclude(folder, models, list(tasks), options.models)


def _folder(options: argparse.Namespace) -> Path:
    if options.to is not None:
        return Path(options.to)
    if len(options.models) == 1 and is_run_folder(options.models[0]):
        return Path(options.models[0]) / FOLDER
    raise ConfigError("--to FOLDER is missing. One run folder alone needs none: it gets `tasks/`.")


# name -> (rows or None, examples or None, what tells them from others)
Tasks = dict[str, tuple[LocalTask | None, LocalTask | None, str]]


def _tasks(options: argparse.Namespace) -> Tasks:
    sources = dict(_named(text) for text in options.shots_from)
    if options.shots and not sources and any("=" in text for text in options.tasks):
        raise ConfigError(
            f"--shots {options.shots}: examples of a local task come from a file of their own. Name"
            " it: --shots-from NAME=FILE."
        )
    found: Tasks = {}
    for text in options.tasks:
        name, path = _named(text, needs_path=False)
        if not path:
            found[name] = (None, None, name)
            continue
        task = read_task(name, Path(path))
        if options.limit is not None and options.limit < len(task.rows):
            # published files are sorted: the first 300 questions of PubMedQA's test are "yes" or
            # "no", and none is "maybe"
            kept = sorted(random.Random(0).sample(range(len(task.rows)), options.limit))
            task = replace(task, rows=[task.rows[number] for number in kept])
        given = sources.pop(name, None)
        examples = read_task(name, Path(given)) if given else None
        if examples is not None and examples.name != task.name:
            raise ConfigError(f"--shots-from {name}: {examples.name}, and the task is {task.name}.")
        content = provenance.fingerprint(
            [task.rows, task.include, dict(task.changes), examples and examples.rows]
        )
        found[task.name] = (task, examples, content)
    if sources:
        raise ConfigError(
            f"--shots-from {', '.join(sources)}: no task of this name is given with a file."
        )
    return found


def _named(text: str, *, needs_path: bool = True) -> tuple[str, str]:
    name, sign, path = text.partition("=")
    if needs_path and not sign:
        raise ConfigError(f"{text}: expected NAME=FILE.")
    return name, path


def _path(folder: Path, model: NamedModel, task: str) -> Path:
    return folder / model.file_name / f"{task}.json"


def _is_there(folder: Path, model: NamedModel, task: str, settings: Mapping[str, Any]) -> bool:
    found = read_record(_path(folder, model, task))
    return found is not None and not provenance.differences(found["settings"], settings)


def _refuse_other(
    folder: Path,
    missing: list[tuple[NamedModel, str]],
    wanted: Mapping[tuple[NamedModel, str], Mapping[str, Any]],
) -> None:
    lines = []
    for model, task in missing:
        found = read_record(_path(folder, model, task))
        if found is not None:
            lines += [
                f"  {_path(folder, model, task)}: {line}"
                for line in provenance.differences(found["settings"], wanted[model, task])
            ]
    if lines:
        shown = "\n".join(lines)
        raise ArtifactError(
            f"{folder} holds results of another model, other questions or other settings:\n{shown}"
            "\nGive another folder with --to, or replace them with --force."
        )


def _measure(
    folder: Path,
    missing: list[tuple[NamedModel, str]],
    wanted: Mapping[tuple[NamedModel, str], Mapping[str, Any]],
    tasks: Tasks,
    how: Options,
) -> None:
    harness, loaded = None, None
    for number, (model, name) in enumerate(missing, start=1):
        print(f"{number} of {len(missing)}: {model.name}, {name}", flush=True)
        if harness is None or loaded != model:
            harness = None  # before the next is loaded: two may not fit
            harness, loaded = Harness(model.source, how), model
        settings = dict(wanted[model, name])
        task, examples, _ = tasks[name]
        path = _path(folder, model, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = (
            write_task(task, folder / DEFINITIONS / name, examples) if task is not None else None
        )
        cache = path.parent / f".{name}-{provenance.fingerprint(settings)[:12]}"
        found = harness.measure(str(written or name), cache)
        for part, result in found.items():
            write_json(
                _path(folder, model, part),
                {"settings": settings, "versions": provenance.versions(), "result": result},
            )
        if name not in found:  # a group: remember its parts
            write_json(path, {"settings": settings, "parts": list(found)})
        for left in path.parent.glob(f"{cache.name}_rank*"):
            with contextlib.suppress(FileNotFoundError):
                left.unlink()


def _conclude(folder: Path, models: list[NamedModel], tasks: list[str], given: list[str]) -> None:
    results: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for model in models:
            found = read_record(_path(folder, model, task)) or {}
            for part in found.get("parts", [task]):
                record = read_record(_path(folder, model, part)) or {}
                results.setdefault(part, {})[model.name] = record["result"]
    names = [model.name for model in models]
    pairs = differences(results, names)
    titles, rows = table(results, names, pairs)
    explained = note(names)
    content = {
        "models": names,
        "control": names[0],
        "tasks": {
            task: {
                model: {key: value for key, value in result.items() if key != "items"}
                for model, result in found.items()
            }
            for task, found in results.items()
        },
        "differences": pairs,
        "table": {"titles": titles, "rows": rows, "note": explained},
        "lm_eval": version(),
        "versions": provenance.versions(),
    }
    write_json(folder / RESULTS, content)
    write_text(folder / "results.md", f"{markdown(titles, rows)}\n{explained}\n")
    print("", *aligned(titles, rows), "", textwrap.fill(explained, WIDTH), "", sep="\n")
    print(f"answers to each question: {folder}/MODEL/TASK.json; the table: {folder}/results.md")
    if folder == Path(given[0]) / FOLDER:
        print(f"in the report: sftmix report {given[0]} --force")
