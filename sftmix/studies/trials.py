"""Run the trials of a study: one run of the recipe for each arm and seed.

Trials of one seed share what their arms have in common. A stage that another trial of the seed has
finished, with the same settings and inputs, is linked into the run folder (hard links: it takes no
space, and published files never change). So the reference model is trained and scored once per
seed, unless an arm changes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sftmix.config.schema import Config
from sftmix.config.study import Study
from sftmix.errors import STOPPED, SftmixError, StoppedError, first_line
from sftmix.pipeline.guard import holding
from sftmix.pipeline.launching import run
from sftmix.pipeline.order import needed_stages, stages_of
from sftmix.storage import artifacts
from sftmix.studies.records import LAST, finished_trial, path_of, write_failure, write_record


def run_trials(
    study: Study,
    seeds: Sequence[int],
    *,
    force: bool,
    restart: bool,
    output: Path | None = None,
    done: Callable[[], object],
) -> dict[tuple[str, int], str]:
    """Runs the trials of these seeds that are not finished, seed by seed, and writes the record of
    each. Calls `done` after each that it ran. force, restart: as of `sftmix run`.
    `limits.wall_clock_minutes` holds for all of them together. output: a file for what the runs
    print; None prints it.

    Returns what stopped the trials that failed, in one line each; the others go on without them.
    Raises StoppedError if the study was asked to stop; the same command goes on from there. Raises
    ArtifactError, before anything runs, for a record of other settings.
    """
    started, failed = time.monotonic(), {}
    arms = list(study.arms)
    trials = [(arm, seed) for seed in seeds for arm in arms]
    finished = {each for each in trials if finished_trial(study, *each, changed=force) is not None}
    for number, (arm, seed) in enumerate(trials, start=1):
        title = f"trial {number}/{len(trials)}: {arm}, seed {seed}"
        config = study.config(arm, seed)
        if (arm, seed) in finished:
            print(f"{title}: finished before ({path_of(study, arm, seed)})", flush=True)
            continue
        print(title, flush=True)
        config = _with_time_left(config, minutes=(time.monotonic() - started) / 60)
        begun = time.monotonic()
        try:
            with _printing_to(output):
                with holding(config, joins=False):
                    others = [study.folder(other, seed) for other in arms if other != arm]
                    share_stages(config, others)
                # with force every stage may be replaced, so all are asked for
                run(config, stage=None if force else LAST, force=force, restart=restart)
        except StoppedError:
            raise
        except SftmixError as error:
            failed[arm, seed] = first_line(error)
            write_failure(study, arm, seed, failed[arm, seed])
            print(f"{title} failed: {error}", flush=True)
        else:
            write_record(study, arm, seed)
            print(f"{title}: {time.monotonic() - begun:.1f} s", flush=True)
        done()
    return failed


@contextlib.contextmanager
def _printing_to(output: Path | None) -> Iterator[None]:
    """What Python code prints goes to the end of a file within the context."""
    if output is None:
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def _with_time_left(config: Config, *, minutes: float) -> Config:
    """Returns the config with what is left of its wall clock limit. Raises StoppedError if nothing
    is. minutes: that have passed."""
    limit = config.limits.wall_clock_minutes
    if limit is None:
        return config
    if minutes >= limit:
        raise StoppedError(
            f"stopped between two trials: limits.wall_clock_minutes ({limit:g}) is over. The same"
            " command goes on from here",
            STOPPED,
        )
    limits = config.limits.model_copy(update={"wall_clock_minutes": limit - minutes})
    return config.model_copy(update={"limits": limits})


def run_jobs(
    study: Study, seeds: Sequence[int], arguments: Sequence[str], *, num_jobs: int
) -> list[int]:
    """Runs `sftmix study ARGUMENTS` in several processes, each with its share of the seeds. Returns
    their exit codes. What their runs print goes to DIR/logs/job_N.log.

    An interrupt and SIGTERM are passed on, and each job saves its state; waits until all have
    ended.
    """
    shares = [seeds[number::num_jobs] for number in range(num_jobs)]
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, share in enumerate(shares, start=1):
            log = study.settings.dir / "logs" / f"job_{number}.log"
            print(f"job {number}: seeds {', '.join(map(str, share))}; output in {log}", flush=True)
            own = ["--only-seeds", *map(str, share), "--output", str(log)]
            command = [sys.executable, "-m", "sftmix.cli", "study", *arguments, *own]
            # in a session of its own, so that only this process gets an interrupt of the terminal
            processes.append(
                subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            )
        return [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share_stages(config: Config, others: Sequence[Path]) -> list[str]:
    """Links the stages that other run folders have finished, with this config's settings and
    inputs, into this config's run folder. Returns their names. A stage that is there already stays
    as it is."""
    shared: list[str] = []
    digests: dict[str, str] = {}
    for stage in needed_stages(stages_of(config), LAST):
        folder = config.run.dir / stage.folder
        if stage.is_view or any(name not in digests for name in stage.reads):
            continue
        inputs = {name: digests[name] for name in stage.reads}
        wanted = artifacts.stage_fingerprint(stage.name, stage.settings(config), inputs)
        if artifacts.read_manifest(folder) is None:
            found = [other / stage.folder for other in others if _has(other / stage.folder, wanted)]
            if found:
                _link(found[0], folder)
                shared.append(stage.name)
        manifest = artifacts.read_manifest(folder)
        if manifest is not None:
            digests[stage.name] = manifest.digest
    return shared


def _has(folder: Path, fingerprint: str) -> bool:
    manifest = artifacts.read_manifest(folder)
    return manifest is not None and manifest.fingerprint == fingerprint


def _link(source: Path, folder: Path) -> None:
    staging = artifacts.new_staging(folder)
    shutil.copytree(source, staging, copy_function=_link_or_copy, dirs_exist_ok=True)
    artifacts.replace_folder(staging, folder)


def _link_or_copy(source: str, target: str) -> Any:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)
    return target
