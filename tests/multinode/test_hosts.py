"""Runs over several hosts, by `deepspeed --hostfile`: namespaces of this machine, joined by cables
and a switch, an sshd on each."""

import hashlib
import json
import re
import shutil
import sys
import time

import pytest
from hosts import INTERFACE, ROOT, finish, hosts, wait_for, why_not
from processes import sftmix
from tiny import TINY

from sftmix.config.reader import dump_config, load_config
from sftmix.storage import artifacts
from sftmix.train.log import read_metrics

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
TORTURE = pytest.mark.torture
SILENT_SECONDS = 4
OPTIONS = [
    *TINY,
    "reference.num_checkpoints=2",
    "checkpoint.every_steps=1",
    f"limits.silent_seconds={SILENT_SECONDS}",
]
OPTIONS += ["confidence.unit_examples=8", "confidence.mode=checkpoints"]
STAGES = ("reference", "baseline", "sftmix")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns a config file, so that no override has to pass through the shells of ssh."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(dump_config(load_config(str(ROOT / "configs" / "quickstart.yaml"), OPTIONS)))
    return path


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """Returns the run folder of the recipe on two ranks of one host."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    sftmix("run", str(config), f"run.dir={folder}", "engine.num_processes=2")
    return folder


def result_of(folder):
    """Returns losses and gradient norms of every step, the weights, the scores, the metrics of the
    models."""
    numbers = ("step", "loss/ntp (nats/token)", "loss/mixup (nats/position)", "grad_norm")
    lines = {
        stage: [
            [line.get(name) for name in numbers]
            for line in read_metrics(folder / stage / "metrics.jsonl")
        ]
        for stage in STAGES
    }
    files = [
        *folder.glob("reference/checkpoints/*/model.safetensors"),
        *folder.glob("*/model/model.safetensors"),
    ]
    files += [folder / "confidence" / "confidence.parquet", folder / "pairing" / "split.parquet"]
    digests = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert len(digests) == 6
    return lines, digests, json.loads((folder / "evaluation" / "metrics.json").read_text())


@TORTURE
def test_the_recipe_over_two_hosts_gives_the_losses_of_two_ranks_on_one(
    config, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    with hosts(2, tmp_path / "hosts") as nodes:
        done = nodes[0].deepspeed("launch/run.py", str(config), f"run.dir={folder}")
    assert "rank 1" not in done.stdout and "shared" not in done.stdout
    assert result_of(folder) == result_of(undisturbed)


def saved_step(folder):
    return max(
        (
            int(path.parent.name[5:])
            for path in folder.glob("work/reference/checkpoints/step_*/manifest.json")
        ),
        default=0,
    )


def reference_of(folder):
    lines = [
        (line["step"], line["loss/ntp (nats/token)"], line["grad_norm"])
        for line in read_metrics(folder / "reference" / "metrics.jsonl")
    ]
    models = sorted((folder / "reference" / "checkpoints").glob("*/model.safetensors"))
    return lines, [hashlib.sha256(path.read_bytes()).hexdigest() for path in models]


def prepared(folder, config, undisturbed):
    """Returns a run folder that holds the data, and the arguments for the reference stage in it."""
    shutil.copytree(undisturbed / "data", folder / "data")
    shutil.copy(undisturbed / "config.yaml", folder)
    return folder, ["launch/run.py", str(config), f"run.dir={folder}", "--stage", "reference"]


@TORTURE
@pytest.mark.parametrize(
    ("number", "slots", "is_shared"),
    [(3, 1, True), (2, 2, False)],
    ids=["three hosts", "two hosts of two ranks with disks of their own"],
)
def test_training_over_hosts_gives_the_losses_of_as_many_ranks_on_one(
    config, undisturbed, tmp_path, number, slots, is_shared
):
    folder, command = prepared(tmp_path / "run", config, undisturbed)
    with hosts(
        number, tmp_path / "hosts", slots=slots, private=None if is_shared else folder
    ) as nodes:
        nodes[0].deepspeed(*command)
        first = reference_of(folder)
        alone, _ = prepared(tmp_path / "alone", config, undisturbed)
    sftmix("reference", str(config), f"run.dir={alone}", f"engine.num_processes={number * slots}")
    assert first == reference_of(alone)


@pytest.mark.parametrize(
    "is_shared",
    [pytest.param(False, marks=TORTURE), pytest.param(True, marks=TORTURE)],
    ids=["disks of their own", "shared storage"],
)
def test_a_host_that_is_cut_off_is_named_and_the_same_command_goes_on_once_it_is_back(
    config, undisturbed, tmp_path, is_shared
):
    folder, command = prepared(tmp_path / "run", config, undisturbed)
    with hosts(2, tmp_path / "hosts", private=None if is_shared else folder) as nodes:
        process = nodes[0].start_deepspeed(*command, fault="train.step:1:4:sleep")
        wait_for(
            lambda: saved_step(folder) == 3 or process.poll() is not None, "the third checkpoint"
        )
        nodes[1].unplug()
        start = time.monotonic()
        done = finish(process, check=False)
        seconds = time.monotonic() - start
        assert done.returncode not in (0, 2, 75)
        named = re.findall(
            r"error: (rank \d+ \(\S+), pid \d+\) has not answered for 4 s", done.stdout
        )
        assert named == ["rank 1 (node1"], done.stdout
        assert seconds < SILENT_SECONDS + 30
        for node in nodes:  # also on the host that nobody reaches
            wait_for(
                lambda node=node: not node.processes(), f"{node.name} still runs {node.processes()}"
            )
        nodes[1].plug()
        again = nodes[0].deepspeed(*command)
    assert "resumed after step 3" in again.stdout
    assert ("data/ is copied to node1" in done.stdout) == (
        not is_shared
    ) and "is copied to" not in again.stdout
    assert reference_of(folder) == reference_of(undisturbed)


def test_hosts_that_share_no_storage_give_the_same_and_say_what_is_where(
    config, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    with hosts(2, tmp_path / "hosts", private=folder) as nodes:
        done = nodes[0].deepspeed("launch/run.py", str(config), f"run.dir={folder}")
        assert (
            done.stdout.count("run.dir is not shared") == 1
            and "on node1 is not the one on node0" in done.stdout
        )
        assert result_of(folder) == result_of(undisturbed)
        theirs = nodes[1].path(folder)
        for name in ("data", "reference", "pairing", "baseline", "sftmix"):
            artifacts.verify(theirs / name)
        assert (
            not (theirs / "confidence").exists()
            and not list((theirs / "work").glob("*"))
            and not list(theirs.glob(".*"))
        )


@TORTURE
def test_without_shared_storage_a_run_goes_on_from_what_each_host_has_saved(
    config, undisturbed, tmp_path
):
    folder, command = prepared(tmp_path / "run", config, undisturbed)
    with hosts(2, tmp_path / "hosts", private=folder) as nodes:
        first = nodes[0].deepspeed(*command, check=False, fault="checkpoint.rename:1:4:kill9")
        assert first.returncode not in (0, 2, 75) and "error: rank 1 (node1" in first.stdout
        assert saved_step(folder) == 4 and saved_step(nodes[1].path(folder)) == 3
        again = nodes[0].deepspeed(*command)
        assert (
            "checkpoint of step 4: not every node has its part" in again.stdout
            and "resumed after step 3" in again.stdout
        )
        assert reference_of(folder) == reference_of(undisturbed)


@TORTURE
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared storage", "disks of their own"])
@pytest.mark.parametrize("launcher", ["pdsh", "ssh", "torchrun"])
def test_sftmix_launch_over_hosts(config, undisturbed, tmp_path, launcher, is_shared):
    folder, _ = prepared(tmp_path / "run", config, undisturbed)
    command = [
        sys.executable,
        "-m",
        "sftmix.cli",
        "launch",
        str(config),
        f"run.dir={folder}",
        "--stage",
        "reference",
    ]
    with hosts(2, tmp_path / "hosts", private=None if is_shared else folder) as nodes:
        where = ["--hostfile", str(nodes[0].folder / "hostfile"), "--launcher", launcher]
        nodes[0].run([*command, *where], GLOO_SOCKET_IFNAME=INTERFACE)
        assert (nodes[0].path(folder) / "logs" / "rank_0000.log").is_file() and (
            nodes[1].path(folder) / "logs" / "rank_0001.log"
        ).is_file()
        assert reference_of(folder) == reference_of(undisturbed)


@TORTURE
def test_the_doctor_looks_at_real_hosts(config, tmp_path):
    folder = tmp_path / "run"
    with hosts(2, tmp_path / "hosts", private=folder) as nodes:
        command = [
            sys.executable,
            "-m",
            "sftmix.cli",
            "doctor",
            str(config),
            f"run.dir={folder}",
            "--quick",
            "--json",
        ]
        command += ["--hostfile", str(nodes[0].folder / "hostfile")]
        found = json.loads(nodes[0].run(command, check=False).stdout)
        by_item = {finding["item"]: finding for finding in found["findings"]}
        assert {"node node0", "node node1"} <= set(by_item)
        assert by_item["node node0"]["verdict"] == "ok", by_item["node node0"]
        assert (
            by_item["node node1"]["verdict"] == "warning"
            and str(folder) in by_item["node node1"]["found"]
        )
        nodes[1].unplug()
        gone = json.loads(nodes[0].run(command, check=False).stdout)
        verdicts = {finding["item"]: finding["verdict"] for finding in gone["findings"]}
        assert verdicts["node node0"] == "ok" and verdicts["node node1"] == "bad"


@TORTURE
# below 3 DeepSpeed lets rank 0 alone write the weights, which every disk needs
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_rank_that_is_asked_to_stop_stops_all_hosts_with_75(
    config, undisturbed, tmp_path, zero_stage
):
    folder, command = prepared(tmp_path / "run", config, undisturbed)
    command.append(f"engine.zero_stage={zero_stage}")
    with hosts(2, tmp_path / "hosts", private=folder) as nodes:
        done = nodes[0].deepspeed(*command, check=False, fault="train.step:1:4:usr1")
        assert (
            done.returncode == 75
            and done.stdout.count("stopped after step 4: SIGUSR1 was received") == 1
        ), done.stdout[-3000:]
        assert saved_step(folder) == saved_step(nodes[1].path(folder)) == 4
        assert not nodes[0].processes() and not nodes[1].processes()
        assert "resumed after step 4" in nodes[0].deepspeed(*command).stdout
    alone, _ = prepared(tmp_path / "alone", config, undisturbed)
    sftmix(
        "reference",
        str(config),
        f"run.dir={alone}",
        "engine.num_processes=2",
        f"engine.zero_stage={zero_stage}",
    )
    assert reference_of(folder) == reference_of(alone)
