"""Starts real ranks: one process each, joined over the loopback interface."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT_SECONDS = 600


def run_ranks(script: Path, num_ranks: int, *arguments: str) -> str:
    """Runs `script` on every rank; returns rank 0's output. A failing rank fails the test with its output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT_SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {num_ranks} ended with {process.returncode}:\n{output[-4000:]}"
    return outputs[0]


def sftmix(*arguments: str, check: bool = True, cwd: Path = ROOT, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, offline and without a GPU; `fault` as in sftmix/faults.py."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
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
    assert not check or done.returncode == 0, f"sftmix {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
