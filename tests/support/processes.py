"""Starts real ranks: one process each, joined over the loopback interface."""

import os
import subprocess
import tempfile
from pathlib import Path

import warm

from sftmix.cluster import local_ranks
from sftmix.cluster.local_ranks import first_failure

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_SECONDS = 600


def run_local_ranks(arguments, num_ranks, *, limit_seconds=TIME_LIMIT_SECONDS, fault=None):
    """Runs `python ARGUMENTS` once for each rank, in processes that start at once; returns how each
    ended."""

    def start(command, *, env, stdout, **_):
        return warm.start(command, env=env, cwd=Path.cwd(), stdout=stdout, stderr=stdout)

    return local_ranks.run_local_ranks(
        arguments,
        num_ranks,
        limit_seconds=limit_seconds,
        environment=environment(fault),
        start=start,
    )


def run_ranks(script: Path, num_ranks: int, *arguments: str) -> str:
    """Runs `script` on every rank; returns rank 0's output. A failing rank fails the test with its
    output."""
    ends = run_local_ranks([str(script), *arguments], num_ranks)
    failure = first_failure(ends)
    assert failure is None, failure
    return ends[0].output


def environment(fault: str | None = None) -> dict[str, str]:
    """Returns the environment of a process: offline, without a GPU and without a launcher's
    variables; `fault` as in sftmix/storage/faults.py."""
    own = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        own.pop(name, None)
    return own if fault is None else {**own, "SFTMIX_FAULT": fault}


def sftmix(
    *arguments: str, check: bool = True, cwd: Path = ROOT, fault: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, offline and without a GPU; `fault` as in
    sftmix/storage/faults.py."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        command = ["-m", "sftmix.cli", *arguments]
        process = warm.start(command, env=environment(fault), cwd=cwd, stdout=stdout, stderr=stderr)
        try:
            process.wait(TIME_LIMIT_SECONDS)
        finally:
            process.kill()
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(
            command, process.returncode, stdout.read().decode(), stderr.read().decode()
        )
    assert not check or done.returncode == 0, (
        f"sftmix {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def sftmix_on_ranks(
    num_ranks: int, stage: str, *arguments: str, check: bool = True, fault: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a stage on several ranks, without the command and its launcher, which take most of the
    time. stdout: what all ranks print, on both streams."""
    if num_ranks == 1:
        return sftmix(stage, *arguments, check=check, fault=fault)
    command = ["-u", str(ROOT / "launch/run.py"), *arguments, "--stage", stage]
    ends = run_local_ranks(command, num_ranks, fault=fault)
    failure = first_failure(ends)
    assert not check or failure is None, failure
    code = next((end.code for end in ends if end.code), 0)
    return subprocess.CompletedProcess(command, code, "".join(end.output for end in ends), "")
