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
        folder = config.run.dir / stage.folder
        manifest = artifacts.read_manifest(folder)
        if manifest is None:
            continue
        digests[stage.name] = manifest.digest
        if stage.name in replaced or stage.is_view:
            continue
        differences = provenance.differences(manifest.settings, stage.settings(config))
        changed = [config_key(config, stage.name, line) for line in differences]
        changed += [
            f"its input `{name}` has been made anew since"
            for name, digest in manifest.inputs.items()
            if name in digests and digests[name] != digest
        ]
        lines += [f"  {stage.name} ({folder}): {line}" for line in changed]
    if lines:
        raise refusal(config, lines)


def refusal(config: Config, lines: list[str]) -> ArtifactError:
    """Returns the error for finished work that would be replaced. lines: what differs."""
    shown = "\n".join(lines)
    return ArtifactError(
        f"{config.run.dir} holds finished work that was made with other settings:\n{shown}\n"
        f"Put them back (`sftmix run {config.run.dir}` takes the config of the run folder), name "
        "another run.dir, or replace the finished work with --force."
    )


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
