"""A run folder has one writer, work of one kind, and one owner."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, sftmix
from reference_runs import (
    OPTIONS,
    PATIENCE,
    QUICKSTART,
    assert_completed,
    begin,
    processes_of,
    reference,
    result_of,
    saved_step,
    wait_for,
)

pytestmark = pytest.mark.distributed


def is_suspended(pid):
    """Returns whether a process has received SIGSTOP."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_of_two_runs_in_one_folder_the_second_is_refused_with_the_first_ones_pid(
    folder, undisturbed
):
    first = begin(folder, 1, fault="train.step:0:2:stop")  # it stays, and stays alive
    wait_for(lambda: saved_step(folder) >= 1 or first.poll() is not None, "the first checkpoint")
    second = reference(folder, 1, check=False)
    assert (
        second.returncode == 2
        and f"pid {first.pid}" in second.stderr
        and "another run" in second.stderr
    )
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=PATIENCE)
    assert_completed(folder, undisturbed, 1)


def test_a_superseded_run_writes_nothing_more(folder):
    first = begin(folder, 1, fault="train.step:0:3:stop")
    wait_for(lambda: is_suspended(first.pid) or first.poll() is not None, "the third step")
    assert saved_step(folder) == 2
    attempts = folder / "attempts"
    attempt = json.loads((attempts / "000002.json").read_text())  # the data stage was the first
    (attempts / "000003.json").write_text(
        json.dumps({**attempt, "attempt": 3, "key": "other", "host": "other"})
    )
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=PATIENCE)
    assert (
        first.returncode == 2
        and "attempt 3 (host other" in output
        and saved_step(folder) == 2
        and not (folder / "reference").exists()
    )


def test_unfinished_work_of_other_settings_is_refused_with_the_differences(folder, undisturbed):
    reference(folder, 1, check=False, fault="train.step:0:4:kill9")
    changed = reference(folder, 1, "train.learning_rate=1e-4", check=False)
    assert (
        changed.returncode == 2
        and "settings.train.learning_rate: 0.003 before, 0.0001 now" in changed.stderr
    )
    assert "saved after step 3" in changed.stderr and "--restart" in changed.stderr
    options = [
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        "data.generator={num_train: 62, num_held_out: 12, noisy_share: 0.2}",
    ]
    data = sftmix("run", *options, check=False)
    assert (
        data.returncode == 2
        and "data.generator.num_train: 61 before, 62 now" in data.stderr
        and saved_step(folder) == 3
    )
    harmless = reference(
        folder,
        1,
        "log.every_steps=2",
        "checkpoint.every_steps=4",
        "limits.silent_seconds=9",
        "checkpoint.keep_last=1",
    )
    assert "resumed after step 3" in harmless.stdout and result_of(folder)[1] == undisturbed(1)[1]
    reference(
        folder, 1, "train.learning_rate=1e-4", "--force", check=False, fault="train.step:0:4:kill9"
    )
    # the other settings' work stays
    assert "up to date" in reference(folder, 1).stdout and saved_step(folder) == 3
    assert reference(folder, 1, "train.learning_rate=2e-4", "--force", check=False).returncode == 2
    anew = reference(folder, 1, "train.learning_rate=2e-4", "--force", "--restart")
    assert "resumed" not in anew.stdout and saved_step(folder) == 0


def start_rank(folder, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [
        sys.executable,
        "launch/run.py",
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        "--stage",
        "reference",
    ]
    return subprocess.run(
        [*command, "limits.join_minutes=0.05"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_and_ports_that_are_taken_are_one_clear_error(folder, rank):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        port = str(taken.getsockname()[1])
        if rank == "0":
            busy = start_rank(folder, **place, MASTER_PORT=port)
            assert (
                busy.returncode == 2
                and f"port {port} of 127.0.0.1 is not available" in busy.stderr
                and "MASTER_PORT" in busy.stderr
            )
    alone = start_rank(folder, **place, MASTER_PORT=port)
    assert (
        alone.returncode == 2
        and f"rank {rank} of 2 could not join the others at 127.0.0.1:{port} within 3 s"
        in alone.stderr
    )


def test_only_the_owner_can_read_a_run_and_nobody_else_can_reach_it(folder):
    before = os.umask(0)
    process = begin(folder, 2, fault="train.step:0:3:stop")
    os.umask(before)
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # listening
                listening.add((fields[1].split(":")[0], fields[9]))
    inodes = {
        str(link.readlink())
        for pid in processes_of(folder)
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    ours = {address for address, inode in listening if f"socket:[{inode}]" in inodes}
    # 127.0.0.1 and ::1
    assert ours and ours <= {"0100007F", "00000000000000000000000001000000"}, ours
    for path in (folder / "work").rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
