"""Decide whether a stage's published output is current, missing, or made with other settings.
Finished work is never replaced silently: `refuse_changed` names the differences before anything
runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sftmix.errors import ArtifactError
from sftmix.storage import artifacts, provenance

if TYPE_CHECKING:
    from sftmix.config.schema import Config
    from sftmix.pipeline.context import Stage

State = Literal["current", "missing", "changed"]
# Config keys of a stage's settings, if their names differ.
NUMERICS = {"seed": "run.seed", "precision": "engine.precision", "deepspeed": "engine.deepspeed"}
SECTIONS = {"data": "data.", "split": "split.", "score": "confidence."}
BESIDE = {"tokenizer": "tokenizer", "content": "data.content", "mask_policy": "mask_policy"}


def state_of(
    stage: Stage,
    folder: Path,
    settings: dict[str, Any],
    inputs: Mapping[str, str],
    *,
    digests: bool = True,
) -> State:
    """Returns the status of a stage's folder for these settings and inputs. A current one is
    verified: raises ArtifactError if a file is damaged. digests: compare contents, not sizes
    alone."""
    manifest = artifacts.read_manifest(folder)
    if manifest is None:
        return "missing"
    if manifest.fingerprint != artifacts.stage_fingerprint(stage.name, settings, inputs):
        return "changed"
    artifacts.verify(folder, digests=digests)
    return "current"


def refuse_changed(config: Config, stages: Iterable[Stage], replaced: set[str]) -> None:
    """Raises ArtifactError if a stage is published and this config asks for another output: other
    settings, or recreated inputs. The message has one line per differing key.

    replaced: stages whose output may be replaced. A view (`Stage.is_view`) may always be replaced.
    Reads only manifests. A missing input, which will be made, is not compared.
    """
    lines: list[str] = []
    digests: dict[str, str] = {}
    for stage in stages:
        manifest = artifacts.read_manifest(config.run.dir / stage.folder)
        if manifest is None:
            continue
        digests[stage.name] = manifest.digest
        if stage.name in replaced or stage.is_view:
            continue
        changed = differing_keys(config, stage, manifest.settings)
        changed += [
            f"its input `{name}` has been made anew since"
            for name, digest in manifest.inputs.items()
            if name in digests and digests[name] != digest
        ]
        lines += [f"  {stage.name} ({manifest_place(config, stage)}): {line}" for line in changed]
    if lines:
        raise refusal(config, lines)


def manifest_place(config: Config, stage: Stage) -> Path:
    """Returns the folder of a stage's output."""
    return config.run.dir / stage.folder


def refusal(config: Config, lines: list[str]) -> ArtifactError:
    """Returns the error for finished work that would be replaced. lines: what differs."""
    shown = "\n".join(lines)
    return ArtifactError(
        f"{config.run.dir} holds finished work that was made with other settings:\n{shown}\n"
        f"Put them back (`sftmix run {config.run.dir}` takes the config of the run folder), name "
        "another run.dir, or replace the finished work with --force."
    )


def differing_keys(config: Config, stage: Stage, before: Mapping[str, Any]) -> list[str]:
    """Returns a line for each differing setting of a stage, by config key. before: settings of its
    output."""
    now = stage.settings(config)
    return [config_key(config, stage.name, line) for line in provenance.differences(before, now)]


def config_key(config: Config, stage: str, line: str) -> str:
    """Returns a line on a setting of a stage that begins with the setting's key in the config."""
    first = line.split(":")[0].split(".")[0]
    if first in NUMERICS:
        return NUMERICS[first] + line.removeprefix(first)
    if stage == "data" and first in BESIDE:
        return BESIDE[first] + line.removeprefix(first)
    if stage == "reference" and first in ("model", "train"):
        return line if getattr(config.reference, first) is None else f"reference.{line}"
    return SECTIONS.get(stage, "") + line
