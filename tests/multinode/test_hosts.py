"""Runs over several hosts, by `deepspeed --hostfile`: namespaces of this machine, joined by cables and a switch, an sshd on each."""

import hashlib
import json
import re
import shutil
import time

import pytest
from nodes import ROOT, finish, hosts, wait_for, why_not
from processes import sftmix
from tiny import TINY

from sftmix.config_file import dump_config, load_config
from sftmix.runlog import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
TORTURE = pytest.mark.torture
SILENT_SECONDS = 4
OPTIONS = [*TINY, "reference.num_checkpoints=2", "checkpoint.every_steps=1", f"limits.silent_seconds={SILENT_SECONDS}"]
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
    """Returns losses and gradient norms of every step, the weights, the scores, the metrics of the models."""
    numbers = ("step", "loss/ntp (nats/token)", "loss/mixup (nats/position)", "grad_norm")
    lines = {stage: [[line.get(name) for name in numbers] for line in read_metrics(folder / stage / "metrics.jsonl")] for stage in STAGES}
    files = [*folder.glob("reference/checkpoints/*/model.safetensors"), *folder.glob("*/model/model.safetensors")]
    files += [folder / "confidence" / "confidence.parquet", folder / "pairing" / "split.parquet"]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert len(digests) == 6
    return lines, digests, json.loads((folder / "evaluation" / "metrics.json").read_text())


def test_the_recipe_over_two_hosts_gives_the_losses_of_two_ranks_on_one(config, undisturbed, tmp_path):
    folder = tmp_path / "run"
    with hosts(2, tmp_path / "hosts") as nodes:
        done = nodes[0].deepspeed("launch/run.py", str(config), f"run.dir={folder}")
    print(done.stdout)
    assert result_of(folder) == result_of(undisturbed)
