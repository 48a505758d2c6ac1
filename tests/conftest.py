"""Before anything imports triton: where there is no GPU its kernels are interpreted, on the CPU."""

import os
import subprocess

# Two files run at a time on two cores: a second thread of each process would only wait for a core.
# Tests of threads set engine.num_threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The longest first: one of them that comes last leaves a core idle for minutes.
LONGEST = (
    "failures",
    "hosts",
    "many_nodes",
    "recipe",
    "stops",
    "ranks",
    "kills",
    "run_folder",
    "precision",
    "packaged",
    "scoring",
    "resume",
    "doctor_command",
    "scoring_survives",
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # stable


@pytest.fixture
def mounted(tmp_path):
    """Mounts a memory file system for a test, or skips it."""
    folders = []

    def mount(options, *, prepare=lambda folder: None):
        folder = tmp_path / f"mounted{len(folders)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=False, capture_output=True
        )
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        folders.append(folder)
        prepare(folder)
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)
