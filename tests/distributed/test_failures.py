"""Runs that are killed, stopped, or started twice, through the real command and its launcher: each ends with a cause and a code that
are true, leaves no process behind, and is completed by the same command with the losses and weights of a run that nothing disturbed."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from processes import ROOT, sftmix
from tiny import TINY

from sftmix.runlog import read_metrics

pytestmark = pytest.mark.distributed
QUICKSTART = "configs/quickstart.yaml"
OPTIONS = [*TINY, "reference.num_checkpoints=2", "checkpoint.every_steps=1", "checkpoint.keep_last=2", "limits.silent_seconds=5"]
TORTURE = pytest.mark.torture
PATIENCE = 120  # seconds until a process that does not end counts as hanging


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures") / "run"
    sftmix("data", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory):
    """Returns, for a number of ranks, the result of a run that nothing disturbed."""
    results = {}

    def of(num_ranks):
        if num_ranks not in results:
            folder = tmp_path_factory.mktemp(f"undisturbed{num_ranks}") / "run"
            shutil.copytree(prepared, folder)
            reference(folder, num_ranks)
            results[num_ranks] = result_of(folder)
        return results[num_ranks]

    return of


@pytest.fixture
def folder(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def reference(folder, num_ranks, *more, **options):
    return sftmix("reference", QUICKSTART, *OPTIONS, f"run.dir={folder}", f"engine.num_processes={num_ranks}", *more, **options)


def begin(folder, num_ranks, *more, fault=None):
    """Starts the same in the background, in a process group of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if fault is not None:
        environment["SFTMIX_FAULT"] = fault
    command = [sys.executable, "-m", "sftmix.cli", "reference", QUICKSTART, *OPTIONS, f"run.dir={folder}", *more]
    return subprocess.Popen(
        [*command, f"engine.num_processes={num_ranks}"],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def result_of(folder):
    """Returns losses of every step, weights of every checkpoint."""
    lines = read_metrics(folder / "reference" / "metrics.jsonl")
    models = sorted((folder / "reference" / "checkpoints").glob("*/model.safetensors"))
    digests = {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in models}
    return [(line["step"], line["loss/ntp (nats/token)"], line["grad_norm"]) for line in lines], digests


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {PATIENCE} s"
        time.sleep(0.05)


def processes_of(folder):
    """Returns pid -> command line of all processes that run on this run folder."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if f"run.dir={folder}" in command and state != "Z":
            found[int(path.parent.name)] = command
    return found


def pids_of(folder, word):
    return [pid for pid, command in processes_of(folder).items() if word in command.split("run.dir=")[0]]


def ranks_of(folder):
    return [pid for pid in pids_of(folder, "launch/run.py") if "deepspeed" not in processes_of(folder).get(pid, "deepspeed")]


def saved_step(folder):
    steps = [int(path.parent.name[5:]) for path in folder.glob("work/reference/checkpoints/step_*/manifest.json")]
    return max(steps, default=0)


def assert_nothing_left(folder):
    wait_for(lambda: not processes_of(folder), f"processes that do not end: {processes_of(folder)}")


def assert_completed(folder, undisturbed, num_ranks, *more):
    """The same command completes the run, with the result of an undisturbed one; something was taken up if it was saved."""
    saved = saved_step(folder)
    again = reference(folder, num_ranks, *more, check=False)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert result_of(folder) == undisturbed(num_ranks)
    assert "Set aside" not in again.stdout  # a kill leaves nothing half done under a checkpoint's name
    if saved:
        assert f"resumed after step {saved}" in again.stdout
    assert not list((folder / "work").glob("*")) and not list(folder.glob(".*"))


SITES = [
    "checkpoint.write", "checkpoint.flush", "checkpoint.agree", "checkpoint.manifest", "checkpoint.rename", "checkpoint.latest",
    "checkpoint.retention", "checkpoint.removal", "resume.load", "train.step", "publish.manifest", "publish.rename",
]  # fmt: skip
MAIN_ONLY = ("checkpoint.manifest", "checkpoint.rename", "checkpoint.latest", "checkpoint.re", "publish")


def assert_survives_kill(folder, undisturbed, site, *, rank, hit, num_ranks):
    if site == "resume.load":
        reference(folder, num_ranks, check=False, fault="train.step:0:4:kill9")
    for _ in range(5 if site == "resume.load" else 1):  # killed while it takes up, again and again
        done = reference(folder, num_ranks, check=False, fault=f"{site}:{rank}:{hit}:kill9")
        assert done.returncode != 0, f"{site} was not reached:\n{done.stdout[-1500:]}"
        assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@pytest.mark.parametrize("site", ["checkpoint.manifest", "checkpoint.rename", "publish.rename"])
def test_killed_between_the_moves_of_a_save(folder, undisturbed, site):
    assert_survives_kill(folder, undisturbed, site, rank=0, hit=1 if site.startswith("publish") else 2, num_ranks=1)


@TORTURE
@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_killed_at_every_site_on_every_rank(folder, undisturbed, site, rank, hit):
    if (rank == 1 and site.startswith(MAIN_ONLY)) or (site.startswith(("publish", "resume")) and hit == 2):
        pytest.skip("rank 0 alone passes there, or once")
    assert_survives_kill(folder, undisturbed, site, rank=rank, hit=hit, num_ranks=2)


@TORTURE
@pytest.mark.parametrize("number", range(25))
def test_killed_at_random(folder, undisturbed, number):
    """A rank, all ranks, the launcher or the command is killed at a random moment, until the run is done."""
    rng = random.Random(number)
    for _ in range(4):
        process = begin(folder, 2)
        is_over = partial(lambda started: started.poll() is not None, process)
        victim = rng.choice(["rank", "ranks", "launcher.launch", "runner", "sftmix.cli"])
        wait_for(lambda is_over=is_over: len(ranks_of(folder)) == 2 or is_over(), "start")
        deadline = time.monotonic() + rng.uniform(0, 14)
        while time.monotonic() < deadline and not is_over():
            time.sleep(0.01)
        pids = ranks_of(folder) if victim.startswith("rank") else pids_of(folder, victim)
        for pid in rng.sample(pids, min(1, len(pids))) if victim == "rank" else pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert_nothing_left(folder)
        if process.returncode == 0:
            break
    if not (folder / "reference").exists():
        assert_completed(folder, undisturbed, 2)
    assert result_of(folder) == undisturbed(2)


def test_a_rank_that_is_killed_is_named_and_the_others_stop(folder, undisturbed):
    done = reference(folder, 2, check=False, fault="train.step:1:4:kill9")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert len(re.findall(r"error: rank 1 \(\S+, pid \d+\) died in reference(?:, step [1-4])?\.", output)) == 1, output[-3000:]
    assert "Connection closed by peer" not in output and "error: rank 0" not in output  # the first cause, and no other
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@pytest.mark.parametrize("action", ["stop", pytest.param("hold", marks=TORTURE)])
def test_a_rank_that_hangs_is_named_and_stacks_are_written(folder, undisturbed, action):
    done = reference(folder, 2, check=False, fault=f"train.step:1:4:{action}")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75) and len(re.findall(r"error: rank 1 \(\S+, pid \d+\) has not answered for 5 s", output)) == 1
    stacks = (folder / "logs" / "stacks" / "rank_0001.txt").read_text()
    assert "faults.py" in stacks and "train.py" in stacks
    assert (folder / "logs" / "stacks" / "rank_0000.txt").read_text()
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@TORTURE
def test_a_rank_that_is_late_is_no_alarm(folder, undisturbed, monkeypatch):
    monkeypatch.setenv("SFTMIX_FAULT_SECONDS", "4")
    reference(folder, 2, fault="train.step:1:*:sleep")  # 8 steps, each later than the limit allows for a heartbeat minus one
    assert result_of(folder) == undisturbed(2)


@pytest.mark.parametrize(
    "action",
    [
        "exit0",
        pytest.param("leave", marks=TORTURE),
        "raise",
        pytest.param("segfault", marks=TORTURE),
        pytest.param("abort", marks=TORTURE),
    ],
)
def test_a_rank_that_leaves_is_no_success(folder, undisturbed, action):
    done = reference(folder, 2, check=False, fault=f"train.step:1:4:{action}")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert "error: rank 1 (" in output and ("RuntimeError: fault injected at train.step" in output) == (action == "raise")
    assert action != "raise" or ") failed in reference, step 3: " in output  # before the fourth
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@TORTURE
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("site", SITES)
def test_an_error_anywhere_on_one_rank_ends_all_with_its_cause(folder, undisturbed, site, rank):
    if rank == 1 and site.startswith(MAIN_ONLY):
        pytest.skip("rank 0 alone passes there")
    if site == "resume.load":
        reference(folder, 2, check=False, fault="train.step:0:4:kill9")
    done = reference(folder, 2, check=False, fault=f"{site}:{rank}:1:raise")
    output = done.stdout + done.stderr
    assert done.returncode not in (0, 2, 75)
    assert output.count(f"error: rank {rank} (") == 1 and f"RuntimeError: fault injected at {site}" in output
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Returns a folder with a finished reference run, and the table of scores that an undisturbed run of two ranks makes of it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(prepared, folder)
    reference(folder, 2)
    other = folder.parent / "undisturbed"
    shutil.copytree(folder, other)
    sftmix("score", QUICKSTART, *OPTIONS, f"run.dir={other}", "engine.num_processes=2")
    return folder, (other / "confidence" / "confidence.parquet").read_bytes()


@TORTURE
@pytest.mark.parametrize("fault", ["shard.write:1:1", "shard.rename:0:1", "publish.manifest:0:1"])
def test_a_rank_that_hangs_while_it_scores_or_merges_is_named(trained, tmp_path, fault):
    folder, expected = tmp_path / "run", trained[1]
    shutil.copytree(trained[0], folder)
    score = partial(sftmix, "score", QUICKSTART, *OPTIONS, f"run.dir={folder}", "engine.num_processes=2", check=False)
    done = score(fault=f"{fault}:stop")
    rank = fault.split(":")[1]
    assert done.returncode not in (0, 2, 75)
    assert len(re.findall(rf"error: rank {rank} \(\S+, pid \d+\) has not answered for 5 s", done.stdout + done.stderr)) == 1
    assert "faults.py" in (folder / "logs" / "stacks" / f"rank_000{rank}.txt").read_text()
    assert_nothing_left(folder)
    assert score().returncode == 0 and (folder / "confidence" / "confidence.parquet").read_bytes() == expected


@TORTURE
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_in_a_save_is_named(folder, undisturbed, rank):
    done = reference(folder, 2, check=False, fault=f"checkpoint.flush:{rank}:2:stop")
    assert done.returncode not in (0, 2, 75) and f"error: rank {rank} (" in done.stdout + done.stderr
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, 2)


@TORTURE
@pytest.mark.parametrize("site", ["resume.convert", "resume.converted"])
def test_killed_while_it_converts_for_other_ranks(folder, undisturbed, site):
    reference(folder, 2, check=False, fault="train.step:0:4:kill9")
    assert reference(folder, 1, check=False, fault=f"{site}:0:1:kill9").returncode != 0
    again = reference(folder, 1)
    assert "resumed after step 3" in again.stdout and not list((folder / "work").glob("*"))
    for (step, loss, _), (expected_step, expected, _) in zip(result_of(folder)[0], undisturbed(2)[0], strict=True):
        assert step == expected_step and abs(loss - expected) <= 1e-6


@pytest.mark.parametrize("victim", ["launcher.launch", pytest.param("runner", marks=TORTURE), pytest.param("sftmix.cli", marks=TORTURE)])
def test_no_rank_outlives_its_launcher(folder, undisturbed, victim):
    process = begin(folder, 2, fault="train.step:0:4:sleep")  # it is not over before it is killed
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    victims = pids_of(folder, victim)
    assert victims, processes_of(folder)
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0  # DeepSpeed's launcher itself ends with 0 when it is killed
    assert_nothing_left(folder)
    assert not (folder / "reference").exists()  # the ranks ended, rather than go on to the end
    assert_completed(folder, undisturbed, 2)


@pytest.mark.parametrize(("number", "num_ranks"), [(signal.SIGTERM, 2), pytest.param(signal.SIGUSR1, 1, marks=TORTURE)])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(folder, undisturbed, number, num_ranks):
    process = begin(folder, num_ranks, "checkpoint.every_steps=")
    wait_for(lambda: (folder / "work" / "reference" / "kept" / "metrics.jsonl").exists() or process.poll() is not None, "the first step")
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and output.count("stopped after step ") == 1 and f"{number.name} was received" in output
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert saved_step(folder) == stopped >= 1  # no step is lost
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@TORTURE
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_sigterm_in_the_middle_of_a_save_loses_nothing(folder, undisturbed, num_ranks):
    done = reference(folder, num_ranks, check=False, fault=f"checkpoint.write:{num_ranks - 1}:3:term")
    assert done.returncode == 75 and "SIGTERM was received" in done.stderr and saved_step(folder) >= 1
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


@TORTURE
@pytest.mark.parametrize(("num_ranks", "times"), [(2, 1), (1, 1), (2, 2)])
def test_control_c_ends_all(folder, undisturbed, num_ranks, times):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script in the background has it ignored
    process = begin(folder, num_ranks, fault="train.step:0:4:sleep")
    signal.signal(signal.SIGINT, before)
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode not in (0, 75), output
    assert_nothing_left(folder)
    assert_completed(folder, undisturbed, num_ranks)


def test_a_second_sigterm_ends_at_once(folder):
    process = begin(folder, 1, "checkpoint.every_steps=", fault="train.step:0:3:sleep")  # 6 s in which the first is not answered
    wait_for(lambda: len(read_metrics_if_there(folder)) == 2 or process.poll() is not None, "the second step")
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: "SIGTERM again ends at once" in process.stdout.readline(), "the answer to the first")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGTERM and saved_step(folder) == 0


def read_metrics_if_there(folder):
    path = folder / "work" / "reference" / "kept" / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def test_the_wall_clock_limit_saves_and_exits_with_75(folder, undisturbed):
    done = reference(folder, 1, "limits.wall_clock_minutes=0.001", "checkpoint.every_steps=", check=False)
    assert done.returncode == 75 and "limits.wall_clock_minutes (0.001) is over" in done.stderr
    assert_completed(folder, undisturbed, 1)


def test_of_two_runs_in_one_folder_the_second_is_refused_with_the_first_ones_pid(folder, undisturbed):
    first = begin(folder, 1, fault="train.step:0:2:stop")  # it stays, and stays alive
    wait_for(lambda: saved_step(folder) >= 1 or first.poll() is not None, "the first checkpoint")
    second = reference(folder, 1, check=False)
    assert second.returncode == 2 and f"pid {first.pid}" in second.stderr and "another run" in second.stderr
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=PATIENCE)
    assert_completed(folder, undisturbed, 1)


def test_a_superseded_run_writes_nothing_more(folder):
    first = begin(folder, 1, fault="train.step:0:3:stop")
    wait_for(lambda: saved_step(folder) >= 2 or first.poll() is not None, "the second checkpoint")
    attempts = folder / "attempts"
    attempt = json.loads((attempts / "000002.json").read_text())  # the data stage was the first
    (attempts / "000003.json").write_text(json.dumps({**attempt, "attempt": 3, "key": "other", "host": "other"}))
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=PATIENCE)
    assert first.returncode == 2 and "attempt 3 (host other" in output and saved_step(folder) == 2 and not (folder / "reference").exists()


def test_unfinished_work_of_other_settings_is_refused_with_the_differences(folder, undisturbed):
    reference(folder, 1, check=False, fault="train.step:0:4:kill9")
    changed = reference(folder, 1, "train.learning_rate=1e-4", check=False)
    assert changed.returncode == 2 and "settings.train.learning_rate: 0.003 before, 0.0001 now" in changed.stderr
    assert "saved after step 3" in changed.stderr and "--restart" in changed.stderr
    options = [QUICKSTART, *OPTIONS, f"run.dir={folder}", "data.generator={num_train: 62, num_held_out: 12, noisy_share: 0.2}"]
    data = sftmix("run", *options, check=False)
    assert data.returncode == 2 and "data: generator.num_train: 61 before, 62 now" in data.stderr and saved_step(folder) == 3
    harmless = reference(folder, 1, "log.every_steps=2", "checkpoint.every_steps=4", "limits.silent_seconds=9", "checkpoint.keep_last=1")
    assert "resumed after step 3" in harmless.stdout and result_of(folder)[1] == undisturbed(1)[1]
    reference(folder, 1, "train.learning_rate=1e-4", check=False, fault="train.step:0:4:kill9")
    assert "up to date" in reference(folder, 1).stdout and saved_step(folder) == 3  # the other settings' work stays
    assert reference(folder, 1, "train.learning_rate=2e-4", check=False).returncode == 2
    anew = reference(folder, 1, "train.learning_rate=2e-4", "--restart")
    assert "resumed" not in anew.stdout and saved_step(folder) == 0


def start_rank(folder, **environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "launch/run.py", QUICKSTART, *OPTIONS, f"run.dir={folder}", "--stage", "reference"]
    return subprocess.run(
        [*command, "limits.join_minutes=0.05"], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_ranks_that_do_not_come_and_ports_that_are_taken_are_one_clear_error(folder, rank):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        port = str(taken.getsockname()[1])
        if rank == "0":
            busy = start_rank(folder, **place, MASTER_PORT=port)
            assert busy.returncode == 2 and f"port {port} of 127.0.0.1 cannot be had" in busy.stderr and "MASTER_PORT" in busy.stderr
    alone = start_rank(folder, **place, MASTER_PORT=port)
    assert alone.returncode == 2 and f"rank {rank} of 2 could not join the others at 127.0.0.1:{port} within 3 s" in alone.stderr


def lock_of(folder):
    return next((folder / "extensions").rglob("lock"), None)


@TORTURE
def test_killed_while_an_extension_is_built(folder):
    """DeepSpeed's Adam for offloaded optimisers is compiled at the first start; the lock of a build that was killed is not waited for."""
    offload = ["engine.deepspeed=configs/deepspeed/zero3_offload.json"]
    process = begin(folder, 1, *offload)
    wait_for(lambda: lock_of(folder) is not None or process.poll() is not None, "the build")
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    assert lock_of(folder) is not None
    reference(folder, 1, *offload)
    assert lock_of(folder) is None


def test_only_the_owner_can_read_a_run_and_nobody_else_can_reach_it(folder):
    before = os.umask(0)
    process = begin(folder, 2, fault="train.step:0:3:stop")
    wait_for(lambda: saved_step(folder) >= 1 or process.poll() is not None, "the first checkpoint")
    listening = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":  # listening
                listening.add((fields[1].split(":")[0], fields[9]))
    inodes = {str(link.readlink()) for pid in processes_of(folder) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    for pid in processes_of(folder):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)
    ours = {address for address, inode in listening if f"socket:[{inode}]" in inodes}
    assert ours and ours <= {"0100007F", "00000000000000000000000001000000"}, ours  # 127.0.0.1 and ::1
    for path in (folder / "work").rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    os.umask(before)


def test_a_gradient_that_is_not_finite_is_skipped_by_all_named_and_ends_the_run_if_it_goes_on(folder):
    """The embedding of one token is NaN: the micro-batches that hold it, on one rank or another, spoil the step of all."""
    from safetensors.torch import load_file, save_file

    untied = "model.architecture=" + next(o for o in TINY if o.startswith("model.architecture=")).split("=", 1)[1].replace("true", "false")
    reference(folder, 1, untied)
    broken = folder / "broken"
    shutil.copytree(folder / "reference" / "checkpoints" / "step_000008", broken)
    weights = load_file(broken / "model.safetensors")
    import datasets

    rows = datasets.Dataset.from_file(str(folder / "data" / "train.arrow"))
    counts = {}
    for ids in rows["input_ids"]:
        for token in set(ids):
            counts[token] = counts.get(token, 0) + 1
    token = min(counts, key=lambda t: (abs(counts[t] - 6), t))
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    holders = {row["example_id"] for row in rows if token in row["input_ids"]}
    model = ["model={path: " + str(broken) + "}", "limits.skipped_steps=100", "train.micro_batch_tokens=40"]
    options = [*OPTIONS, f"run.dir={folder}", "engine.num_processes=2", *model]
    done = sftmix("reference", QUICKSTART, *options)
    written = [json.loads(line) for line in (folder / "reference" / "skipped_steps.jsonl").read_text().splitlines()]
    assert written and {line["not_finite"] for line in written} == {"loss"}
    named = {i for line in written for i in line["example_ids"]}
    assert holders <= named and len(named) < len(rows)  # their micro-batches, and not the whole step
    last = read_metrics(folder / "reference" / "metrics.jsonl")[-1]
    assert last["steps/skipped (steps)"] == len(written) == done.stdout.count("skipped: the loss is not finite")
    refused = sftmix("reference", QUICKSTART, *options, "--force", "train.learning_rate=3e-2", "limits.skipped_steps=1", check=False)
    assert refused.returncode == 2 and refused.stderr.count("no gradient was finite from step") == 1
