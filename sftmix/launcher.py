"""Starts the processes of a run on this machine through DeepSpeed's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sftmix.config import Config

RUN_SCRIPT = Path(__file__).resolve().parent / "launch" / "run.py"


def launch(config: Config, config_path: str, overrides: list[str], *, only: str | None, force: bool, restart: bool) -> int:
    """Runs `deepspeed launch/run.py` with `engine.num_processes` ranks and returns its exit code.

    DeepSpeed's launcher exits with 0 when it is killed itself, so success is believed only if the output is there:
    current, and, where it was to be made again, new.
    """
    from sftmix.artifacts import MANIFEST
    from sftmix.engine.distributed import free_port, has_gpu
    from sftmix.pipeline import first_unfinished_stage, folder_of_last

    count = config.engine.num_processes
    goal = folder_of_last(config, only) / MANIFEST
    before = goal.stat().st_ino if goal.exists() else None
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_accelerators", str(count),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        str(RUN_SCRIPT), config_path, *overrides, *(["--stage", only] if only else []),
        *(["--force"] if force else []), *(["--restart"] if restart else []),
    ]  # fmt: skip
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        return code
    unfinished = first_unfinished_stage(config, only)
    if unfinished or (force and goal.stat().st_ino == before):
        print(f"sftmix: the launcher ended, but {unfinished or only} was not published: it was killed. Start again.", file=sys.stderr)
        return 1
    return 0
