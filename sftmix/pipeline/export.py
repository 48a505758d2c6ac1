"""Verified copies of finished models, with their final card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sftmix.config.reader import load_config
from sftmix.config.schema import Config
from sftmix.errors import ArtifactError, ConfigError
from sftmix.evaluation.model_cards import STAGE_OF, write_model_card
from sftmix.pipeline.context import Stage
from sftmix.pipeline.order import stages_of
from sftmix.pipeline.up_to_date import config_key
from sftmix.storage import artifacts, provenance


def export(config: Config, *, which: str, to: Path, adapter: bool = False) -> Path:
    """Copies a verified exported model, or its LoRA adapter alone, to `to`, which must not exist or
    be empty. Returns `to`.

    The card has the held-out results if the model was evaluated. Files and folders get modes from
    the user's umask, although the run folder is private. Raises ArtifactError if the model is
    missing, damaged, or made with other settings than the config's; ConfigError if the target is in
    use.
    """
    if which not in STAGE_OF:
        raise ConfigError(f"--which is {which!r}; expected one of {', '.join(STAGE_OF)}.")
    folder = config.run.dir / which
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} holds no finished model. Run `sftmix run CONFIG` first.")
    _refuse_other_settings(config, which, folder)
    artifacts.verify(folder)
    source = folder / ("adapter" if adapter else "model")
    if not source.is_dir():
        raise ArtifactError(
            f"--adapter: {folder} holds no adapter, since all weights were trained. Leave --adapter"
            " out, or set model.lora."
        )
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to: {to} exists and is not an empty folder. Name another.")
    metrics = _metrics(config, which, manifest.digest)
    try:
        for path in [source, *sorted(source.rglob("*"))]:
            target = to / path.relative_to(source)
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                shutil.copyfile(path, target)  # without copying the mode
        write_model_card(to, config, which, is_adapter=adapter, metrics=metrics)
    except OSError:
        shutil.rmtree(to, ignore_errors=True)  # do not leave an incomplete model
        raise
    return to


def _metrics(config: Config, which: str, digest: str) -> dict[str, Any] | None:
    """Returns the held-out figures of this very model; None if it was not evaluated, or if another
    one was."""
    folder = config.run.dir / "evaluation"
    manifest = artifacts.read_manifest(folder)
    if manifest is None or manifest.inputs.get(STAGE_OF[which]) != digest:
        return None
    artifacts.verify(folder)
    found: dict[str, dict[str, Any]] = json.loads(
        (folder / "metrics.json").read_text(encoding="utf-8")
    )
    return found.get(STAGE_OF[which])


def _refuse_other_settings(config: Config, which: str, folder: Path) -> None:
    """Raises ArtifactError if the model, or what it was made from, has other settings than the
    config's."""
    stages = {stage.name: stage for stage in stages_of(config)}
    if STAGE_OF[which] not in stages:
        raise ConfigError(
            f"--which {which}: baseline.enabled is false in this config, and {folder} holds a"
            " baseline. Set it to true."
        )
    saved = load_config(config.run.dir / "config.yaml")
    lines = [
        f"tokenizer.{line}"
        for line in provenance.differences(
            saved.tokenizer.model_dump(), config.tokenizer.model_dump()
        )
    ]
    needed = [STAGE_OF[which]]
    for name in needed:  # the list grows
        stage = stages[name]
        needed += [read for read in stage.reads if read not in needed]
        manifest = artifacts.read_manifest(config.run.dir / stage.folder)
        if manifest is not None:
            differences = _differences(config, stage, manifest.settings)
            lines += [
                line
                for found in differences
                if (line := config_key(config, name, found)) not in lines
            ]
    if lines:
        raise ArtifactError(
            f"{folder} was made with other settings than this config's:\n"
            + "".join(f"  {line}\n" for line in lines)
            + "Put them back, or export with the run folder's own config: `sftmix export"
            f" {config.run.dir / 'config.yaml'}`."
        )


def _differences(config: Config, stage: Stage, made_with: dict[str, Any]) -> list[str]:
    """Returns what differs between the settings that a stage was run with and the config's.

    Ignores what the config does not contain: the content of files, and the precision that `auto`
    means on this machine.
    """
    if stage.name == "data":
        now = {**config.data.model_dump(mode="json"), "seed": config.run.seed}
        return provenance.differences({key: made_with.get(key) for key in now}, now)
    anywhere = config.model_copy(
        update={"engine": config.engine.model_copy(update={"precision": "fp32"})}
    )
    now = stage.settings(anywhere)
    if "precision" in now:
        given = config.engine.precision
        now["precision"] = made_with.get("precision") if given == "auto" else given
    if now.get("scores") and made_with.get("scores"):  # hashes of a table's files
        now["scores"] = made_with["scores"]
    return provenance.differences(_without_files(made_with), _without_files(now))


def _without_files(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_files(item) for key, item in value.items() if key != "files"}
    return [_without_files(item) for item in value] if isinstance(value, list) else value
