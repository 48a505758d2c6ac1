"""`sftmix doctor` as a command, and what it says of other nodes."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctoring import only, stand_in
from processes import ROOT, sftmix

from sftmix.cluster.environment import free_port
from sftmix.cluster.hostfile import Node
from sftmix.config.reader import load_config
from sftmix.doctor.checks import nodes
from sftmix.doctor.checks.versions import digest_of, identity

# What nodes say.


def report(**changes):
    own = {
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "commit": "a" * 40,
        "code": "c",
        "config": {"train": {"epochs": 3}},
        "data": {},
    }
    return {"identity": {**own, **changes}, "findings": []}


def test_what_differs_between_two_nodes_is_named():
    assert nodes.compare("node b", report(), report()) == []
    other = report(
        versions={"torch": "2.13.0", "deepspeed": "0.19.6"},
        commit="b" * 40,
        code="d",
        config={"train": {"epochs": 4}},
        data={"x.json": "e"},
    )
    found = [
        finding.found
        for finding in nodes.compare("node b", report(), {**other, "sees_run_folder": False})
    ]
    assert len(found) == 6
    for words in (
        "deepspeed 0.19.6 there, 0.19.8 here",
        "other commit",
        "other code",
        "train.epochs 4 there, 3 here",
        "x.json e there, nothing here",
    ):
        assert any(words in text for text in found), words
    assert "not shared" in found[-1]
    # the same files, without .git
    assert nodes.compare("node b", report(), report(commit=None)) == []


def test_skew_counts_only_beyond_the_time_that_asking_takes(monkeypatch):
    def answers(text, code=0, error=""):
        return lambda: subprocess.CompletedProcess([], code, text, error)

    assert nodes.measure_skew(answers(f"{time.time() + 30:.9f}\n"))[0] == pytest.approx(30, abs=1)
    assert nodes.measure_skew(answers(f"{time.time() - 30:.9f}"))[0] == pytest.approx(-30, abs=1)

    def now():
        return subprocess.CompletedProcess([], 0, f"{time.time():.9f}", "")

    assert nodes.measure_skew(now) == (0.0, None)
    assert nodes.measure_skew(answers("12:30\n")) == (None, None)
    assert nodes.measure_skew(answers("", 255, "Permission denied (publickey).")) == (
        None,
        "Permission denied (publickey).",
    )


SSH = """
import os, sys
options, (host, command) = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
assert "BatchMode=yes" in options and "ConnectTimeout=10" in options
if host == "gone":
    sys.exit("ssh: connect to host gone port 22: No route to host")
if host == "late" and command.startswith("date"):
    command = "date -d '1 hour ago' +%s.%N"
if host == "empty" and not command.startswith("date"):
    command = "echo welcome; exit 127"
os.chdir("/")
os.environ["MASTER_PORT"] = "{port}"  # the default one may be taken where the tests run
os.execvp("sh", ["sh", "-c", command])
"""


def test_nodes_are_asked_over_ssh_and_each_is_judged(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", monkeypatch, "ssh", SSH.replace("{port}", str(free_port())))
    folder = tmp_path / "a folder; with $(odd) letters"
    folder.mkdir()
    (folder / "hosts").write_text(
        "".join(f"{host} slots=2\n" for host in ("near", "late", "gone", "empty"))
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    (folder / "run.yaml").write_text((ROOT / "configs/quickstart.yaml").read_text())
    done = sftmix(
        "doctor",
        "run.yaml",
        "run.dir=$(touch hacked) x",
        "--quick",
        "--hostfile",
        "hosts",
        "--json",
        cwd=folder,
        check=False,
    )
    found = json.loads(done.stdout)
    lines = [
        f"{f['item']}: {f['verdict']}: {f['found']}"
        for f in found["findings"]
        if f["item"].startswith("node ")
    ]
    for words in (
        "node near: ok: 2 slots; versions, code, config and data as here",
        "node late: bad: its clock is 3",
        "node gone: bad: cannot be reached: ssh: connect to host gone port 22: No route to host",
        "node empty: bad: its doctor gave no report (exit code 127): welcome",
    ):
        assert any(line.startswith(words) for line in lines), (words, lines)
    assert (
        not any(": other " in line or "not shared" in line for line in lines)
        and done.returncode == 1
    )
    # nothing ran, nothing was left
    assert sorted(path.name for path in folder.iterdir()) == ["hosts", "run.yaml"]


def test_without_ssh_the_nodes_are_bad(monkeypatch):
    monkeypatch.setattr(nodes.shutil, "which", lambda name: None)
    assert "there is no ssh" in only(nodes.check_nodes([Node("a", 1)], report(), [])).found


def test_a_remote_command_is_one_quoted_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = nodes.remote_command(["--json", "run.dir=$(touch hacked)"])
    assert words[:2] == ["sh", "-c"] and shlex.split(words[2].split(" && exec ")[1])[-2:] == [
        "--json",
        "run.dir=$(touch hacked)",
    ]


def test_digests_tell_files_apart(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")
    before = digest_of(tmp_path), digest_of(tmp_path / "a")
    (tmp_path / "a").write_text("two")
    assert all(
        old != new
        for old, new in zip(before, (digest_of(tmp_path), digest_of(tmp_path / "a")), strict=True)
    )
    monkeypatch.setattr("sftmix.doctor.checks.versions.WHOLE_BYTES", 1)
    monkeypatch.setattr("sftmix.doctor.checks.versions.END_BYTES", 2)
    large = digest_of(tmp_path / "a")
    (tmp_path / "a").write_text("twe")
    assert digest_of(tmp_path / "a") != large and digest_of(Path("owner/name")) is None
    assert (
        identity(load_config(ROOT / "configs/quickstart.yaml", []))["config"]["train"]["epochs"]
        == 6
    )


# The command.


@pytest.mark.distributed
def test_the_whole_doctor_with_two_ranks(tmp_path):
    done = sftmix(
        "doctor",
        "configs/quickstart.yaml",
        "engine.num_processes=2",
        f"run.dir={tmp_path / 'run'}",
        "--json",
        check=False,
    )
    found = json.loads(done.stdout)
    by_item = {finding["item"]: finding for finding in found["findings"]}
    assert (
        by_item["ZeRO-3 gradients"]["verdict"] == "ok"
        and by_item["ZeRO-3 gradients"]["facts"]["gradient"] < 1e-5
    )
    assert (
        by_item["bandwidth"]["facts"]["step_seconds"] > 0
        and len(by_item["bandwidth"]["facts"]["sizes"]) >= 1
    )
    assert {
        "config",
        "model",
        "versions",
        "run folder",
        "free space",
        "other runs",
        "memory",
    } <= by_item.keys()
    assert (
        done.returncode == (1 if found["counts"]["bad"] else 0) and list(tmp_path.iterdir()) == []
    )


def test_a_config_that_does_not_load_is_a_finding_and_the_rest_is_examined(tmp_path):
    done = sftmix("doctor", "configs/quickstart.yaml", "train.epoch=2", "--quick", check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and lines[0].startswith("bad      config") and "epochs" in lines[0]
    assert (
        any(line.split()[1] == "versions" for line in lines)
        and "1 bad" in lines[-1]
        and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_precision_that_the_device_does_not_have_is_refused_in_one_line(tmp_path, command):
    """The patch stands for an accelerator without fp16, whatever this machine has."""
    folder = tmp_path / "run"
    arguments = [command, "configs/quickstart.yaml", "engine.precision=fp16", f"run.dir={folder}"]
    program = (
        "import sys; from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator as A;"
        " A.is_fp16_supported = lambda self: None; from sftmix.cli import main;"
        f" sys.exit(main({[*arguments, *(['--quick'] * (command == 'doctor'))]}))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if "engine.precision is" in line
    ]
    assert done.returncode == 2 and len(lines) == 1 and "fp16" in lines[0] and not folder.exists()
    assert "Use bf16 or fp32" in lines[0] and "Traceback" not in done.stderr


def test_a_torch_that_cannot_be_imported_is_a_finding(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudart.so.13: cannot open shared object file')"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    done = sftmix("doctor", "configs/quickstart.yaml", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for item in ("config", "CUDA", "ranks"):
        assert re.search(f"bad +{item} .*libcudart.so.13", done.stdout), (item, done.stdout)
    assert re.search("(ok|warning) +ports ", done.stdout)


def test_a_hostfile_that_cannot_be_used_is_a_users_mistake():
    done = sftmix("doctor", "--quick", "--hostfile", "/nowhere", check=False)
    assert done.returncode == 2 and "--hostfile /nowhere cannot be read" in done.stderr
