"""A study: a config with a section `study`, which names the arms and the seeds.

Each arm is the config with some sections replaced. Each pair of an arm and a seed is a trial: one
run of the recipe that trains one model, in a run folder of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from sftmix.config.messages import explain
from sftmix.config.reader import apply_overrides, check_config, lay_over, read_layers
from sftmix.config.schema import Config, Int, RunConfig, Section
from sftmix.config.shipped import find_config
from sftmix.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of an arm: it names a folder
STUDY = "study"


def _seeds(value: Any) -> Any:
    """A whole number N stands for the seeds 0 to N - 1."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return list(range(value)) if is_count else value


class StudySection(Section):
    dir: Path = Field(description="Folder of the study; each trial has a run folder in it.")
    seeds: Annotated[list[Int], BeforeValidator(_seeds)] = Field(
        [0, 1, 2, 3, 4], description="run.seed of the trials: a list, or how many, from 0 on."
    )
    control: str = Field(description="The arm that each other arm is compared with.")
    outcome: Literal["loss", "exact_match"] = Field(
        "loss",
        description=(
            "What the summary is about, chosen before the study: held-out loss in nats per response"
            " token, or the share of held-out responses that greedy decoding would produce."
        ),
    )
    arms: dict[str, dict[str, Any]] = Field(
        description="Name of each arm, and the sections and keys in which it differs."
    )

    @model_validator(mode="after")
    def _can_compare(self) -> StudySection:
        wrong = [name for name in self.arms if not NAME.fullmatch(name)]
        if wrong:
            raise ValueError(
                f"`arms`: {wrong[0]!r} cannot name a folder; use letters, digits, `.`, `_` and `-`"
            )
        if len(self.arms) < 2:
            raise ValueError(f"`arms`: expected two or more, found {len(self.arms)}")
        if self.control not in self.arms:
            raise ValueError(
                f"`control` is {self.control!r}, and the arms are {', '.join(self.arms)}"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"`seeds`: expected different numbers from 0 on, found {self.seeds}")
        return self


@dataclass(frozen=True)
class Study:
    """settings: of the study. arms: the checked config of each arm, with the first seed and without
    a baseline: an arm trains one model."""

    settings: StudySection
    arms: dict[str, Config]

    def folder(self, arm: str, seed: int) -> Path:
        """Returns the run folder of a trial."""
        return self.settings.dir / "trials" / arm / f"seed_{seed}"

    def config(self, arm: str, seed: int) -> Config:
        """Returns the config of a trial."""
        run = RunConfig(dir=self.folder(arm, seed), seed=seed)
        return self.arms[arm].model_copy(update={"run": run})


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Returns the study of a YAML file. overrides: `key.sub=value`, for every arm, or for the study
    itself (`study.seeds=3`).

    Raises ConfigError as `load_config` does, for each arm; for a file without a section `study`;
    and for an override of a key that an arm sets itself.
    """
    path = find_config(path)
    raw, places = read_layers(path)
    apply_overrides(raw, places, overrides)
    if STUDY not in raw:
        raise ConfigError(
            f"{path}: no section `study`, which names the arms and the seeds. `sftmix configs`"
            " lists studies that come with sftmix; `sftmix run` runs a config without one."
        )
    section = raw.pop(STUDY)
    try:
        settings = StudySection.model_validate(section)
    except ValidationError as error:
        lines = [
            explain({**detail, "loc": (STUDY, *detail["loc"])}, path, places, {STUDY: StudySection})
            for detail in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
    arms = {}
    for name, arm in settings.arms.items():
        _refuse_lost(name, arm, overrides)
        prefix = (STUDY, "arms", name)
        inside = {key[3:]: place for key, place in places.items() if key[:3] == prefix}
        merged, merged_places = copy.deepcopy(raw), dict(places)
        lay_over(merged, merged_places, copy.deepcopy(arm), inside, ())
        merged["run"] = {"dir": str(settings.dir), "seed": settings.seeds[0]}
        merged["baseline"] = {"enabled": False}
        try:
            arms[name] = check_config(merged, merged_places, path)
        except ConfigError as error:
            raise ConfigError(f"arm `{name}`: {error}") from None
    return Study(settings, arms)


def _refuse_lost(name: str, arm: dict[str, Any], overrides: Sequence[str]) -> None:
    for override in overrides:
        keys, found = override.partition("=")[0].split("."), arm
        while keys and isinstance(found, dict) and keys[0] in found:
            found = found[keys.pop(0)]
        if not keys or not isinstance(found, dict):
            raise ConfigError(
                f"override `{override}`: the arm `{name}` sets this key itself. Leave the override"
                " out, or change the arm in the file."
            )
