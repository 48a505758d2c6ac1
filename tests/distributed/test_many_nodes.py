"""`sftmix launch` with real launchers and ranks on two nodes, which an `ssh` of ours puts on this
machine; ranks of srun and mpirun."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import nodes_on_this_machine
from processes import ROOT, sftmix, sftmix_on_ranks
from tiny import TINY

from sftmix.cluster.environment import free_port
from sftmix.cluster.local_ranks import OF_A_LAUNCHER, run_local_ranks
from sftmix.train.log import read_metrics

pytestmark = pytest.mark.distributed
TORTURE = pytest.mark.torture
QUICKSTART = "configs/quickstart.yaml"
OPTIONS = [
    *TINY,
    "reference.num_checkpoints=2",
    "checkpoint.every_steps=1",
    "limits.silent_seconds=5",
]
PATIENCE = 120


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many_nodes") / "run"
    sftmix("data", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def on_one_host(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_host") / "run"
    shutil.copytree(prepared, folder)
    sftmix_on_ranks(2, "reference", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return losses_of(folder)


def losses_of(folder):
    return [
        (line["step"], line["loss/ntp (nats/token)"], line["grad_norm"])
        for line in read_metrics(folder / "reference/metrics.jsonl")
    ]


def launch(folder, *more, port=None, fault=None):
    (folder.parent / "hosts").write_text("a slots=1\nb slots=1\n")
    without_launcher = {
        name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER
    }
    environment = {
        **without_launcher,
        **nodes_on_this_machine(folder.parent),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "PDSH_RCMD_TYPE": "ssh",
    }
    environment |= {"SFTMIX_FAULT": fault, "SFTMIX_FAULT_SECONDS": "90"} if fault else {}
    command = [
        sys.executable,
        "-m",
        "sftmix.cli",
        "launch",
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        "--stage",
        "reference",
    ]
    command += [
        "--hostfile",
        str(folder.parent / "hosts"),
        "--master-addr",
        "127.0.0.2",
        "--master-port",
        str(port or free_port()),
        *more,
    ]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(process):
    output, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, output


def log_of(folder, rank):
    path = folder / "logs" / f"rank_{rank:04d}.log"
    return path.read_text() if path.exists() else ""


def wait_for(condition, process, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, (
            f"{what}: {process.poll()} {process.communicate()[0][-3000:]}"
        )
        time.sleep(0.05)


def processes_of(folder):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            is_ours = (
                f"run.dir={folder}".encode() in path.read_bytes()
                and "Z" not in (path.parent / "stat").read_text().split(") ")[1][:1]
            )
        except OSError:
            continue
        found += [path.parent.name] if is_ours else []
    return found


@pytest.mark.parametrize("launcher", ["pdsh", pytest.param("torchrun", marks=TORTURE)])
def test_two_nodes_give_the_losses_of_one_host_and_each_rank_has_its_log(
    folder, on_one_host, launcher
):
    if launcher == "pdsh" and shutil.which("pdsh") is None:
        pytest.skip("there is no pdsh here")
    code, output = end_of(launch(folder, "--launcher", launcher))
    assert code == 0, output[-3000:]
    assert losses_of(folder) == on_one_host and "[2/" in output
    for rank in (0, 1):
        assert re.match(r"--- \S+ host \S+ pid \d+\n", log_of(folder, rank))
    assert "reference" in log_of(folder, 0)
    hosts = {line.split()[0] for line in (folder.parent / "ssh.log").read_text().splitlines()}
    assert hosts == {"a", "b"}
    attempt = json.loads((folder / "attempts/000002.json").read_text())
    assert attempt["outcome"] == 0 and "ended" in attempt


@TORTURE
def test_sigterm_saves_and_the_code_is_75_though_torchrun_ends_with_1(folder, on_one_host):
    process = launch(folder, "--launcher", "torchrun")
    wait_for(
        lambda: list(folder.glob("work/reference/checkpoints/step_*/manifest.json")),
        process,
        "the first checkpoint",
    )
    os.kill(process.pid, signal.SIGTERM)
    code, output = end_of(process)
    if code == 0:
        pytest.skip("the run was over before it was asked")
    assert code == 75 and "SIGTERM was received" in output, output[-3000:]
    code, output = end_of(launch(folder, "--launcher", "torchrun"))
    assert code == 0 and "resumed after step" in output and losses_of(folder) == on_one_host, (
        output[-3000:]
    )


@TORTURE
def test_a_second_sigterm_ends_the_ranks_of_all_nodes(folder):
    process = launch(folder, "--launcher", "ssh", fault="train.step:*:3:sleep")
    wait_for(
        lambda: list(folder.glob("work/reference/checkpoints/step_000002/manifest.json")),
        process,
        "the second checkpoint",
    )
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
    process.wait(PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM
    deadline = time.monotonic() + 20  # the third step takes 90
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(folder)


@TORTURE
def test_what_a_rank_died_of_is_named_and_the_code_is_no_success(folder):
    code, output = end_of(launch(folder, "--launcher", "ssh", fault="train.step:1:2:kill9"))
    assert (
        code not in (0, 75)
        and "rank 1" in output + log_of(folder, 0)
        and "died" in output + log_of(folder, 0)
    ), output[-3000:]


@TORTURE
def test_one_node_at_a_time_on_the_machine_itself(folder, on_one_host):
    """`--node-rank`, as in Kubernetes: each node starts its own part, and no ssh is asked."""
    port = free_port()
    parts = [
        launch(folder, "--launcher", "ssh", "--node-rank", str(number), port=port)
        for number in (0, 1)
    ]
    ends = [end_of(part) for part in parts]
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses_of(folder) == on_one_host and not (folder.parent / "ssh.log").exists()


@TORTURE
@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_ranks_that_srun_or_mpirun_started_by_themselves(folder, on_one_host, launcher):
    """Without either here: ranks get the variables that they would set, and not RANK."""
    shown = {
        "srun": (
            "SLURM_JOB_ID=77 SLURM_STEP_ID=0 SLURM_PROCID=$RANK SLURM_LOCALID=$RANK SLURM_NODEID=0"
            " SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost"
        ),
        "mpirun": (
            "OMPI_COMM_WORLD_RANK=$RANK OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=$RANK"
            " OMPI_COMM_WORLD_LOCAL_SIZE=2"
        ),
    }[launcher]
    hidden = " ".join(f"-u {name}" for name in sorted(OF_A_LAUNCHER))
    run = f'exec env {hidden} $(eval echo "$SHOWN") "$0" launch/run.py "$@"'
    command = [
        "bash",
        "-c",
        run,
        sys.executable,
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        "--stage",
        "reference",
    ]
    environment = {
        "SHOWN": shown,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ends = run_local_ranks(command, 2, limit_seconds=PATIENCE, environment=environment)
    assert [end.code for end in ends] == [0, 0], ends[0].output[-3000:]
    assert losses_of(folder) == on_one_host and not (folder / "logs/rank_0000.log").exists()
