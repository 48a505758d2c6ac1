"""The benchmarks run, and refuse to compare what is not the same."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

TINY_STEP = (
    "--rounds 2 --hidden-size 32 --layers 1 --vocab-size 500 --limit 40 --batch-size 8".split()
)


def test_the_step_benchmark_has_a_row_for_every_provider(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [
        sys.executable,
        "benchmarks/step.py",
        *TINY_STEP,
        "--out",
        str(tmp_path / "step.json"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "step.json").read_text())
    for name, row in report["providers"].items():
        if "trl" in name and importlib.util.find_spec("trl") is None:
            assert row == "not measured: trl is not installed" and row in done.stdout
        else:
            assert row["ms"] > 0 and 0 <= row["padding_share"] < 1, name
    assert (
        len(report["providers"]) == 5
        and report["ratios"]["sftmix (ours) / ntp (ours)"]["ratio"] > 0
    )


def test_twins_that_differ_are_refused(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    step = importlib.import_module("step")
    same = {
        name: step.StepResult(loss=2.0, grad_norm=1.0, num_padded_tokens=8, num_micro_batches=1)
        for name in (step.NTP, step.TRL_NTP)
    }
    step.check_twins(same, "fp32")
    other = step.StepResult(loss=2.0, grad_norm=1.002, num_padded_tokens=8, num_micro_batches=1)
    with pytest.raises(AssertionError, match="grad_norm: ntp .ours. 1, ntp .trl. 1.002"):
        step.check_twins({**same, step.TRL_NTP: other}, "fp32")
