"""Records: what each trial measured, one small file per trial.

A record outlives its run folder, and can be copied to another machine: a trial with a record counts
as finished. So a study can go on elsewhere, and its models can be deleted. A trial that failed has
a record too, which says why; it runs again the next time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sftmix.config.study import Study
from sftmix.errors import ArtifactError
from sftmix.evaluation.report import read_json
from sftmix.pipeline.order import needed_stages, stages_of
from sftmix.pipeline.run import first_unfinished_stage
from sftmix.storage import artifacts, provenance
from sftmix.storage.files import write_text
from sftmix.studies.results import TRAINED, Trial
from sftmix.train.log import NTP, read_metrics

LAST = "evaluate"  # the stage that a trial ends with
FORMAT = 1
COSTS = {
    "minutes": ("waited_seconds", 60),
    "tokens": ("num_real_tokens", 1),
    "watt_hours": ("energy_joules", 3600),
}
SETTINGS, FAILED = "settings", "failed"


def path_of(study: Study, arm: str, seed: int) -> Path:
    """Returns the file of a trial's record."""
    return study.settings.dir / "records" / arm / f"seed_{seed}.json"


def finished_trial(study: Study, arm: str, seed: int, *, changed: bool = False) -> Trial | None:
    """Returns the result of a finished trial, from its record, or from its run folder, of which it
    then writes the record; None if the trial is not finished.

    changed: a record of other settings than the study's is one of an unfinished trial. Otherwise it
    raises ArtifactError, as for a record that cannot be read.
    """
    path = path_of(study, arm, seed)
    content = _read(path)
    differences = []
    if content is not None and FAILED not in content:
        differences = provenance.differences(content[SETTINGS], _settings(study, arm, seed))
    if content is None or FAILED in content or (differences and changed):
        is_finished = first_unfinished_stage(study.config(arm, seed), LAST) is None
        return write_record(study, arm, seed) if is_finished else None
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ArtifactError(
            f"{path} is the record of a trial with other settings:\n{lines}\nPut them back, give"
            " the study another `study.dir`, or replace the trial with --force."
        )
    kinds: dict[str, Any] = {
        "ids": np.str_,
        "nll_sum": np.float64,
        "num_tokens": np.float64,
        "is_exact": np.bool_,
    }
    columns = {key: np.asarray(content[key], dtype=kind) for key, kind in kinds.items()}
    curve = [(int(step), float(loss)) for step, loss in content["curve"]]
    others = {each.name: content[each.name] for each in fields(Trial)}
    return Trial(**{**others, **columns, "curve": curve})


def failure_of(study: Study, arm: str, seed: int) -> str | None:
    """Returns why the last attempt of a trial failed; None if it did not."""
    content = _read(path_of(study, arm, seed))
    return None if content is None else content.get(FAILED)


def write_record(study: Study, arm: str, seed: int) -> Trial:
    """Writes the record of a trial whose run folder is finished. Returns its result."""
    trial = _measured(study, arm, seed)
    columns = ("ids", "nll_sum", "num_tokens", "is_exact")
    content = {**vars(trial), **{key: getattr(trial, key).tolist() for key in columns}}
    _write(study, arm, seed, content)
    return trial


def write_failure(study: Study, arm: str, seed: int, text: str) -> None:
    """Writes why a trial failed."""
    _write(study, arm, seed, {FAILED: text})


def _write(study: Study, arm: str, seed: int, content: Mapping[str, Any]) -> None:
    path = path_of(study, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, SETTINGS: _settings(study, arm, seed), **content}
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no record of a trial that this version reads ({error}). Remove it, and the"
            " trial runs again."
        ) from None
    return content


def _settings(study: Study, arm: str, seed: int) -> dict[str, Any]:
    """Returns what the result of a trial depends on, by stage."""
    config = study.config(arm, seed)
    stages = needed_stages(stages_of(config), LAST)
    return {stage.name: stage.settings(config) for stage in stages}


def _measured(study: Study, arm: str, seed: int) -> Trial:
    config = study.config(arm, seed)
    folder = config.run.dir
    metrics = read_json(folder / "evaluation" / "metrics.json")[TRAINED]
    table = pq.read_table(folder / "evaluation" / "per_example.parquet")
    manifest = artifacts.read_manifest(folder / "sftmix")
    assert manifest is not None  # the trial is finished
    costs = {
        stage.name: {name: found[key] / unit for name, (key, unit) in COSTS.items() if key in found}
        for stage in stages_of(config)
        # without Mixup, the reference only orders the data, as it does for the arms with it
        if (config.mixup.weight > 0 or stage.name == TRAINED)
        and "waited_seconds" in (found := _facts_in(folder / stage.folder))
    }
    lines = read_metrics(folder / "sftmix" / "metrics.jsonl")
    return Trial(
        loss=metrics["loss_nats_per_token"],
        exact_match=metrics["exact_match"],
        ids=table["example_id"].to_numpy(),
        nll_sum=table["nll_sum"].to_numpy().astype(float),
        num_tokens=table["num_response_tokens"].to_numpy().astype(float),
        is_exact=table["is_exact"].to_numpy().astype(bool),
        costs=costs,
        curve=[(line["step"], line[NTP]) for line in lines if line.get(NTP) is not None],
        facts={
            **manifest.facts,
            "date": artifacts.date_of(folder / "sftmix"),
            "versions": provenance.as_text(manifest.versions),
            "commit": manifest.commit,
        },
    )


def _facts_in(folder: Path) -> dict[str, Any]:
    manifest = artifacts.read_manifest(folder)
    return {} if manifest is None else manifest.facts
