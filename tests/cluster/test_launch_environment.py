"""Ranks started by DeepSpeed, torchrun, mpirun and srun know their place; a process that was
started alone is left alone."""

import os
import signal
import subprocess
import sys

import pytest
from processes import ROOT

from sftmix.cluster.environment import first_host, launched_rank, rank_of, translate
from sftmix.cluster.liveness.stopping import asking_to_stop
from sftmix.errors import ConfigError

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
COMPANIONS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


def translated(**environment):
    translate(environment)
    return environment


def companions(environment):
    return tuple(environment.get(name) for name in COMPANIONS)


def test_tasks_of_srun_are_ranks():
    environment = translated(**SRUN)
    assert companions(environment) == ("5", "7", "1", "3", "gpu07")
    assert 1024 < int(environment["MASTER_PORT"]) < 32768
    assert environment["MASTER_PORT"] != translated(**{**SRUN, "SLURM_STEP_ID": "1"})["MASTER_PORT"]
    assert (
        environment["MASTER_PORT"]
        == translated(**{**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})[
            "MASTER_PORT"
        ]
    )
    again = dict(environment)
    translate(again)
    assert again == environment


def test_an_address_that_is_set_stays():
    environment = translated(**SRUN, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    "alone",
    [
        {},
        # the batch script itself
        {name: value for name, value in SRUN.items() if "STEP" not in name} | {"SLURM_PROCID": "0"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun --pty
        {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_what_is_no_rank_is_left_as_it_is(alone):
    assert launched_rank(alone) is None and rank_of(alone) == 0 and translated(**alone) == alone


def test_processes_of_mpirun_are_ranks_and_must_be_told_where_they_meet():
    environment = translated(**MPIRUN, MASTER_ADDR="node-1")
    assert (
        companions(environment) == ("2", "4", "0", "2", "node-1")
        and environment["MASTER_PORT"] == "29500"
    )
    with pytest.raises(ConfigError, match="rank 2 of 4 was started by mpirun.*Set MASTER_ADDR"):
        translated(**MPIRUN)
    here = translated(**{**MPIRUN, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert (
        here["MASTER_ADDR"] == "127.0.0.1"
        and not launched_rank(here).is_on_many_nodes
        and launched_rank(environment).is_on_many_nodes
    )


def test_the_nearest_launcher_counts():
    assert companions(translated(**SRUN, **MPIRUN, MASTER_ADDR="a"))[:2] == ("2", "4")
    inner = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "LOCAL_SIZE": "1",
    }
    found = translated(**SRUN, **MPIRUN, **inner)
    # LOCAL_SIZE is DeepSpeed's word
    assert companions(found) == ("1", "2", "1", "1", "a") and launched_rank(found).is_on_many_nodes


def test_what_was_carried_under_another_name_gets_its_own_back():
    found = translated(SFTMIX_SET_NCCL_IB_HCA="mlx5_0,mlx5_1", NCCL_IB_HCA="mlx5_0")
    assert found == {"NCCL_IB_HCA": "mlx5_0,mlx5_1"}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-010,20],login1", "gpu003"),
        ("a", "a"),
        ("a,b", "a"),
        ("rack[1-2]n[05-08],x", "rack1n05"),
        ("n[9]", "n9"),
        ("a-b.c,d", "a-b.c"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "-v", "a$(id)", "gpu[", "[x]"])
def test_what_is_no_node_list_is_refused(nodes):
    with pytest.raises(ConfigError, match="Set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({**SRUN, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', expected a number"),
        (
            {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"},
            "SLURM_LOCALID is not set",
        ),
        ({"RANK": "-1"}, "RANK is '-1', expected a number"),
    ],
)
def test_what_is_no_number_is_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        translated(**wrong)


COMPLETE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"MASTER_ADDR": None},
            "RANK is set, and MASTER_ADDR is not. Unset RANK to run without a launcher",
        ),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": None, "MASTER_ADDR": None}, "MASTER_ADDR and MASTER_PORT are not"),
        ({"WORLD_SIZE": None}, "RANK is set, and WORLD_SIZE is not"),
        ({"RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2: ranks are numbered from 0"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first', expected a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected a number"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, expected a port"),
    ],
)
def test_a_rank_whose_companions_are_missing_or_wrong_is_refused(wrong, words):
    assert translated(**COMPLETE) == COMPLETE  # the test of the test
    with pytest.raises(ConfigError, match=words):
        translated(
            **{name: value for name, value in (COMPLETE | wrong).items() if value is not None}
        )


def test_tasks_per_node_that_are_not_told_are_not_guessed():
    assert launched_rank({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}).local_size == 4
    assert launched_rank({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}).local_size is None


def test_the_watch_and_the_engine_see_the_same_rank(monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    assert rank_of() == 5
    code = "from sftmix.cluster.environment import launched_rank; print(launched_rank().rank)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "5\n"


def test_a_rank_takes_the_gpu_that_it_sees(monkeypatch):
    from sftmix.engine import process_group

    monkeypatch.setattr(process_group, "has_gpu", lambda: True)
    monkeypatch.setenv("RANK", "3")
    # one: srun --gpus-per-task shows each task its own
    for visible, local_rank, expected in ((4, "3", 3), (1, "3", 0), (1, "0", 0)):
        monkeypatch.setattr(
            process_group.torch.cuda, "device_count", lambda visible=visible: visible
        )
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert process_group._local_rank() == expected and os.environ["LOCAL_RANK"] == str(expected)
    monkeypatch.setattr(process_group.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(
        ConfigError, match="rank 3 is the 4th of this machine, and 2 GPUs are visible"
    ):
        process_group._local_rank()


def test_a_node_that_is_stopped_before_there_is_a_run_folder_ends(tmp_path):
    with pytest.raises(SystemExit) as ended, asking_to_stop(tmp_path / "run/stop"):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.value.code == 128 + signal.SIGUSR1
