"""Starts real ranks: one process each, joined over the loopback interface."""

import os
import subprocess
import sys
from pathlib import Path

from sftmix.cluster.local_ranks import first_failure, run_local_ranks

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_SECONDS = 600


def run_ranks(script: Path, num_ranks: int, *arguments: str) -> str:
    """Runs `script` on every rank; returns rank 0's output. A failing rank fails the test with its
    output."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(script), *arguments]
    ends = run_local_ranks(
        command, num_ranks, limit_seconds=TIME_LIMIT_SECONDS, environment=environment
    )
    failure = first_failure(ends)
    assert failure is None, failure
    return ends[0].output


def sftmix(
    *arguments: str, check: bool = True, cwd: Path = ROOT, fault: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, offline and without a GPU; `fault` as in
    sftmix/storage/faults.py."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if fault is not None:
        environment["SFTMIX_FAULT"] = fault
    done = subprocess.run(
        [sys.executable, "-m", "sftmix.cli", *arguments],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_SECONDS,
        check=False,
    )
    assert not check or done.returncode == 0, (
        f"sftmix {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done
