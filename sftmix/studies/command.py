"""`sftmix study`: run the trials of a study, and compare its arms as results come in."""

from __future__ import annotations

import argparse
import os
import shlex
import signal

from sftmix.config.study import Study, load_study
from sftmix.errors import (
    INTERRUPTED,
    STOPPED,
    ConfigError,
    StoppedError,
    TrainingError,
    counted,
)
from sftmix.pipeline import preflight
from sftmix.studies.page import print_results, write_results
from sftmix.studies.records import failure_of, finished_trial
from sftmix.studies.results import ArmResult, Trial, compare
from sftmix.studies.trials import run_jobs, run_trials


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
    seeds = list(options.only_seeds or study.settings.seeds)
    for config in study.arms.values():
        preflight.check(config)
    arguments = [options.config, *options.overrides]

    def publish() -> list[ArmResult]:
        results = collect(study)
        command = shlex.join(["sftmix", "study", *arguments])
        write_results(study, results, failures(study), command=command)
        return results

    os.umask(0o077)  # only the user may read data and weights
    num_jobs = min(options.jobs, len(seeds))
    if num_jobs > 1:
        flags = [f"--{name}" for name in ("force", "restart") if getattr(options, name)]
        codes = run_jobs(study, seeds, [*arguments, *flags], num_jobs=num_jobs)
        # by a signal: between two trainings, where there is no state to save
        stopped = {STOPPED, INTERRUPTED, -signal.SIGTERM, -signal.SIGINT} & set(codes)
        if stopped:
            raise StoppedError(
                "the jobs were stopped and have saved their state; the same command goes on",
                INTERRUPTED if stopped & {INTERRUPTED, -signal.SIGINT} else STOPPED,
            )
        lost = [str(number) for number, code in enumerate(codes, start=1) if code]
    else:
        failed = run_trials(
            study,
            seeds,
            force=options.force,
            restart=options.restart,
            output=options.output,
            done=publish,
        )
        lost = [f"{arm}, seed {seed}: {text}" for (arm, seed), text in failed.items()]
    results = publish()
    if options.output is None:  # no job of another study process
        print_results(study, results)
        print(f"\npage: {study.settings.dir / 'index.html'}")
    if lost:
        what = "job" if num_jobs > 1 else "trial"
        raise TrainingError(f"{counted(len(lost), what)} failed: {'; '.join(lost)}")
    return 0


def collect(study: Study) -> list[ArmResult]:
    """Returns the results of all finished trials, also of those that other processes ran."""
    found: dict[str, dict[int, Trial]] = {arm: {} for arm in study.arms}
    for arm in study.arms:
        for seed in study.settings.seeds:
            trial = finished_trial(study, arm, seed, changed=True)
            if trial is not None:
                found[arm][seed] = trial
    return compare(found, study.settings.control, study.settings.outcome)


def failures(study: Study) -> dict[tuple[str, int], str]:
    """Returns why trials failed, also those of other processes."""
    trials = [(arm, seed) for arm in study.arms for seed in study.settings.seeds]
    found = {trial: failure_of(study, *trial) for trial in trials}
    return {trial: text for trial, text in found.items() if text is not None}
