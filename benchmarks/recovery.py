"""How long a run takes to notice a rank that is killed or stopped, and to take the next step after
the same command is given again.

    python benchmarks/recovery.py [--trials 10] [--hangs 3] [--out FILE.json]

Every trial starts the reference stage of the quickstart with two ranks and a checkpoint at every
step, waits for a random checkpoint, sends SIGKILL (or SIGSTOP) to rank 1, waits for the command to
end, gives it again, and waits for its first new checkpoint. Noticed: until the command has ended
and no process is left; recovered: from the signal until that checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import side_by_side
import torch

from sftmix.storage.files import write_json

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds after which a trial has failed


def begin(folder: Path, silent_seconds: float) -> subprocess.Popen[str]:
    """Starts the reference stage."""
    settings = [
        "engine.num_processes=2",
        "checkpoint.every_steps=1",
        f"limits.silent_seconds={silent_seconds}",
        f"run.dir={folder}",
    ]
    command = [
        sys.executable,
        "-m",
        "sftmix.cli",
        "reference",
        "configs/quickstart.yaml",
        *settings,
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def saved_step(folder: Path) -> int:
    """Returns the newest checkpoint's step."""
    steps = [
        int(path.parent.name[5:])
        for path in folder.glob("work/reference/checkpoints/step_*/manifest.json")
    ]
    return max(steps, default=0)


def wait_until(condition: Any) -> float:
    """Returns the moment at which a condition holds."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {LIMIT} s")
        time.sleep(0.005)
    return time.monotonic()


def rank_pid(folder: Path, rank: int) -> int:
    """Returns the process of a rank."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            is_it = f"RANK={rank}".encode() in path.read_bytes().split(b"\0")
            command = (path.parent / "cmdline").read_bytes().decode()
        except OSError:
            continue
        if is_it and f"run.dir={folder}" in command:
            return int(path.parent.name)
    raise ProcessLookupError(f"no rank {rank} on {folder}")


def is_running(folder: Path) -> bool:
    """Is any process left that works on a folder?"""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (
                f"run.dir={folder}".encode() in path.read_bytes()
                and (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
            ):
                return True
        except OSError:
            continue
    return False


def trial(
    folder: Path, number: signal.Signals, silent_seconds: float, rng: random.Random
) -> tuple[float, float]:
    """Returns seconds until the failure is noticed, and until the run goes on."""
    process = begin(folder, silent_seconds)
    goal = saved_step(folder) + rng.randint(1, 4)
    wait_until(lambda: saved_step(folder) >= goal or process.poll() is not None)
    os.kill(rank_pid(folder, 1), number)
    signalled = time.monotonic()
    output, _ = process.communicate(timeout=LIMIT)
    ended = wait_until(lambda: not is_running(folder))
    named = re.search(r"error: rank 1 \(.*", output)
    assert process.returncode != 0 and named, output[-2000:]
    before = saved_step(folder)
    process = begin(folder, silent_seconds)
    goes_on = wait_until(lambda: saved_step(folder) > before or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0][-2000:]
    process.terminate()  # saves, and leaves the folder for the next trial
    process.communicate(timeout=LIMIT)
    print(
        f"  {number.name}: noticed in {ended - signalled:.2f} s, goes on after"
        f" {goes_on - signalled:.1f} s: {named[0][:100]}",
        flush=True,
    )
    return ended - signalled, goes_on - signalled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=10, help="with SIGKILL")
    parser.add_argument(
        "--hangs",
        type=int,
        default=3,
        help="with SIGSTOP, and the default of limits.silent_seconds",
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record, rng = (
        side_by_side.machine(torch.device("cpu"), "benchmarks/recovery.py"),
        random.Random(0),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "sftmix.cli",
                "data",
                "configs/quickstart.yaml",
                f"run.dir={folder}",
            ],
            cwd=ROOT,
            check=True,
        )
        for what, number, count in (
            ("killed", signal.SIGKILL, options.trials),
            ("stopped", signal.SIGSTOP, options.hangs),
        ):
            times = [trial(folder, number, 20.0, rng) for _ in range(count)]
            for title, values in zip(("noticed", "goes on"), zip(*times, strict=True), strict=True):
                ordered = sorted(values)
                row = {
                    "median": ordered[len(ordered) // 2],
                    "95th percentile": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
                }
                record[f"rank {what}: {title} (s)"] = row | {"trials": len(ordered)}
                print(f"rank {what}: {title} {row}", flush=True)
    if options.out is not None:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
