"""Starts the processes of a run on this machine through DeepSpeed's own launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sftmix.config import Config

RUN_SCRIPT = Path(__file__).resolve().parent / "launch" / "run.py"


def launch(config: Config, config_path: str, overrides: list[str], *, only: str | None, force: bool) -> int:
    """Runs `deepspeed launch/run.py` with `engine.num_processes` ranks and returns its exit code.

    The launcher exits with 0 when it is killed itself, so success is believed only if the output was published.
    """
    from sftmix.artifacts import read_manifest
    from sftmix.engine.distributed import free_port
    from sftmix.pipeline import stages_of

    folders = {stage.name: config.run.dir / stage.folder for stage in stages_of(config)}
    goal = folders[only] if only else list(folders.values())[-1]
    if force or only is None:
        before = None
    else:
        before = read_manifest(goal)
    count = config.engine.num_processes
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_accelerators", str(count),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        str(RUN_SCRIPT), config_path, *overrides, *(["--stage", only] if only else []), *(["--force"] if force else []),
    ]  # fmt: skip
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    import torch

    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == 0 and read_manifest(goal) is None and before is None:
        print(f"sftmix: the launcher ended, but {goal} was not published: it was killed", file=sys.stderr)
        return 1
    return code
