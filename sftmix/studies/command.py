"""`sftmix study`: run the trials of a study, and compare its arms as results come in."""

from __future__ import annotations

import argparse
import os
import shlex

from sftmix.config.study import Study, load_study
from sftmix.errors import ConfigError, TrainingError, counted
from sftmix.pipeline import preflight
from sftmix.pipeline.run import first_unfinished_stage
from sftmix.studies.page import print_results, write_results
from sftmix.studies.results import ArmResult, Trial, compare, read_trial
from sftmix.studies.trials import LAST, run_trials


def run_study(options: argparse.Namespace) -> int:
    """Runs what the command line asks for. Returns the exit code.

    Raises ConfigError for a seed that the study does not have, TrainingError if trials failed, and
    StoppedError if the study was asked to stop.
    """
    study = load_study(options.config, options.overrides)
    unknown = sorted(set(options.only_seeds or ()) - set(study.settings.seeds))
    if unknown:
        raise ConfigError(
            f"--only-seeds {unknown[0]}: the seeds of this study are"
            f" {', '.join(map(str, study.settings.seeds))}."
        )
    seeds = options.only_seeds or study.settings.seeds
    for config in study.arms.values():
        preflight.check(config)
    command = shlex.join(["sftmix", "study", options.config, *options.overrides])
    failed: dict[tuple[str, int], str] = {}

    def publish() -> list[ArmResult]:
        results = collect(study)
        write_results(study, results, failed, command=command)
        return results

    os.umask(0o077)  # only the user may read data and weights
    failed |= run_trials(study, seeds, force=options.force, restart=options.restart, done=publish)
    results = publish()
    print_results(study, results)
    print(f"\npage: {study.settings.dir / 'index.html'}")
    if failed:
        raise TrainingError(
            f"{counted(len(failed), 'trial')} failed: "
            + "; ".join(f"{arm}, seed {seed}: {text}" for (arm, seed), text in failed.items())
        )
    return 0


def collect(study: Study) -> list[ArmResult]:
    """Returns the results of all finished trials, also of those that other processes ran."""
    found: dict[str, dict[int, Trial]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.settings.seeds:
            config = study.config(arm, seed)
            if first_unfinished_stage(config, LAST) is None:
                found[arm][seed] = read_trial(study, arm, seed)
    return compare(found, study.settings.control, study.settings.outcome)
