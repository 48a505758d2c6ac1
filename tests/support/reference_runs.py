"""Starts the reference stage of a tiny run through the real command and its launcher, looks at what
is left of it, and completes it."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

from processes import ROOT, environment, run_local_ranks, sftmix
from tiny import TINY

from sftmix.train.log import read_metrics

QUICKSTART = "configs/quickstart.yaml"
OPTIONS = [
    *TINY,
    "reference.num_checkpoints=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=2",
    "limits.silent_seconds=5",
]
PATIENCE = 120  # seconds until a process that does not end counts as hanging
SITES = [
    "checkpoint.write",
    "checkpoint.flush",
    "checkpoint.agree",
    "checkpoint.manifest",
    "checkpoint.rename",
    "checkpoint.latest",
    "checkpoint.retention",
    "checkpoint.removal",
    "resume.load",
    "train.step",
    "publish.manifest",
    "publish.rename",
]
MAIN_ONLY = (
    "checkpoint.manifest",
    "checkpoint.rename",
    "checkpoint.latest",
    "checkpoint.re",
    "publish",
)


def reference(folder, num_ranks, *more, **options):
    return sftmix(
        "reference",
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        f"engine.num_processes={num_ranks}",
        *more,
        **options,
    )


def complete(folder, num_ranks, *more):
    """Starts the ranks themselves, without the command and its launcher: half of the time goes
    into starting processes. Returns exit codes and outputs."""
    run = [str(ROOT / "launch/run.py"), str(ROOT / QUICKSTART), f"run.dir={folder}"]
    command = ["-u", *run, *OPTIONS, *more, "--stage", "reference"]
    return run_local_ranks(command, num_ranks, limit_seconds=PATIENCE)


def begin(folder, num_ranks, *more, fault=None):
    """Starts the same in the background, in a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "sftmix.cli",
        "reference",
        QUICKSTART,
        *OPTIONS,
        f"run.dir={folder}",
        *more,
    ]
    return subprocess.Popen(
        [*command, f"engine.num_processes={num_ranks}"],
        env=environment(fault),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def result_of(folder):
    """Returns losses of every step, weights of every checkpoint."""
    lines = read_metrics(folder / "reference" / "metrics.jsonl")
    models = sorted((folder / "reference" / "checkpoints").glob("*/model.safetensors"))
    digests = {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in models}
    return [
        (line["step"], line["loss/ntp (nats/token)"], line["grad_norm"]) for line in lines
    ], digests


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
    return [
        pid for pid, command in processes_of(folder).items() if word in command.split("run.dir=")[0]
    ]


def ranks_of(folder):
    return [
        pid
        for pid in pids_of(folder, "launch/run.py")
        if "deepspeed" not in processes_of(folder).get(pid, "deepspeed")
    ]


def saved_step(folder):
    steps = [
        int(path.parent.name[5:])
        for path in folder.glob("work/reference/checkpoints/step_*/manifest.json")
    ]
    return max(steps, default=0)


def assert_nothing_left(folder):
    wait_for(lambda: not processes_of(folder), f"processes that do not end: {processes_of(folder)}")


def assert_completed(folder, undisturbed, num_ranks, *more):
    """The same command completes the run, with the result of an undisturbed one; something was
    resumed if it was saved."""
    saved = saved_step(folder)
    ends = complete(folder, num_ranks, *more)
    assert [end.code for end in ends] == [0] * num_ranks, [end.output[-3000:] for end in ends]
    assert result_of(folder) == undisturbed(num_ranks)
    # a kill leaves nothing half done under a checkpoint's name
    assert "Set aside" not in ends[0].output, ends[0].output
    if saved:
        assert f"resumed after step {saved}" in ends[0].output, ends[0].output
    assert not list((folder / "work").glob("*")) and not list(folder.glob(".*"))
