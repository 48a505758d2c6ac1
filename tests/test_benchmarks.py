"""The benchmarks run, and refuse to compare what is not the same."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from measured import result
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


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a script of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


def row(value, low, high, better="lower", name="a"):
    row = {"part": "p", "name": name, "unit": "s", "better": better}
    return {**row, "value": value, "low": low, "high": high}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (row(1.0, 0.9, 1.1), row(1.2, 1.05, 1.3), "within noise"),  # spreads overlap
        (row(1.0, 0.9, 1.1), row(1.2, 1.15, 1.3), "WORSE"),
        (row(1.0, 0.9, 1.1), row(0.8, 0.75, 0.85), "better"),
        (row(1.0, 1.0, 1.0), row(1.02, 1.02, 1.02), "within noise"),  # too near
        (row(1.0, 0.9, 1.1, "higher"), row(0.8, 0.75, 0.85, "higher"), "WORSE"),
        (row(1.0, 0.9, 1.1, "higher"), row(1.2, 1.15, 1.3, "higher"), "better"),
        (row(1.0, 0.9, 1.1, ""), row(1.2, 1.15, 1.3, ""), "changed"),
    ],
)
def test_a_change_is_what_noise_does_not_explain(benchmarks, before, after, said):
    assert benchmarks("compare").verdict(before, after) == said


def test_files_of_two_machines_are_not_compared_without_a_word(benchmarks, tmp_path):
    record = {"device": "x", "cpus": 2, "cpu_threads": 2, "commit": "c" * 40}
    one = {**record, "versions": {"torch": "1"}, "rows": [row(1, 1, 1), row(1, 1, 1, name="b")]}
    two = {**record, "device": "y", "versions": {"torch": "2"}, "rows": [row(2, 2, 2)]}
    for name, content in (("one", one), ("two", two)):
        (tmp_path / name).write_text(json.dumps(content))
    command = [sys.executable, "benchmarks/compare.py", tmp_path / "one", tmp_path / "two"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # worse
    assert "another machine: device x, then y" in done.stdout
    assert "another version: torch 1, then 2" in done.stdout
    assert "only before: p: b" in done.stdout and "2.000  WORSE" in done.stdout


def test_the_suite_reads_what_the_benchmarks_write(benchmarks, tmp_path):
    suite = benchmarks("suite")
    for part, name, rows in (
        ("kernels", "kernels_cpu_202611", 10),
        ("step", "step_cpu_202611", 4),
        ("train", "train_cpu_202611", 7),
        ("scoring", "scoring_cpu_202611", 4),
        ("split", "split_cpu_202611", 1),
        ("checkpoint", "checkpoint_cpu_202611", 5),
        ("planner", "planner_cpu_202611", 3),
    ):
        found = suite.READERS[part](result(name))
        assert len(found) == rows, (part, [each.name for each in found])
        assert all(0 < each.low <= each.value <= each.high for each in found), part
    assert set(suite.SIZES["cpu"]) == set(suite.SIZES["cuda"]) == set(suite.READERS)


TINY = {
    "checkpoint": "--hidden-size 64 --rounds 2",
    "kernels": "--shapes 256,64,1000 --rounds 2 --only sftmix ntp",
    "scoring": "--limit 40 --rounds 2 --hidden-size 64",
    "split": "--rows 20000 --rounds 2",
}


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=pytest.mark.torture if part in ("kernels", "split") else ())
        for part in TINY
    ],
)
def test_a_part_of_the_suite_runs(benchmarks, tmp_path, part):
    found = benchmarks("suite").measure(part, {part: TINY[part].split()}, tmp_path)
    assert found and all(row.part == part for row in found)
    assert all(0 < row.low <= row.value <= row.high for row in found)


def test_a_part_that_fails_says_why(benchmarks, tmp_path):
    with pytest.raises(RuntimeError, match="unrecognized arguments: --no"):
        benchmarks("suite").measure("split", {"split": ["--no"]}, tmp_path)


def test_the_tables_of_kernels_are_those_of_the_results(benchmarks):
    page = (ROOT / "docs/kernels.md").read_text()
    code, losses = benchmarks("machine_code"), benchmarks("predicted_kernels")
    found = code.table(result("machine_code"), rows=8192, columns=128256, width=4096)
    assert "\n".join(found) in page
    assert "\n".join(losses.table(result("kernels_gpu"))) in page


def test_the_tables_of_scaling_are_those_of_the_results(benchmarks):
    page = (ROOT / "docs/scaling.md").read_text()
    for name, table in benchmarks("scaling_tables").tables(result("scaling")).items():
        assert table in page, name


def test_the_least_time_is_that_of_the_slowest_unit(benchmarks):
    """By hand for a kernel of 12 bytes, 100 instructions and 6 exponentials per column."""
    code = benchmarks("machine_code")
    report = {"loaded": 8, "stored": 4, "instructions": 100, "special": 6}
    seconds = code.seconds_on_h100(report, programs=4096, columns=128256)
    columns = 4096 * 128256
    assert seconds["memory"] == pytest.approx(columns * 12 / 3.0e12, rel=0.01)
    assert seconds["issue"] == pytest.approx(columns * 100 / (132 * 4 * 32 * 1.83e9), rel=0.01)
    assert seconds["special"] == pytest.approx(columns * 6 / (132 * 16 * 1.83e9), rel=0.01)
    least = code.bound_of(report, programs=4096, columns=128256)
    assert least == pytest.approx(max(seconds.values()) + 5e-6)


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;   /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   MUFU.EX2 R8, R8 ;
        /*0030*/              @!P0 STG.E.64 desc[UR4][R2.64], R4 ;
        /*0040*/                   NOP ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0070*/                   BRA 0x70 ;
"""


def test_machine_code_is_counted_within_its_loops(benchmarks):
    """One loop of four instructions: 16 bytes read, 8 written, one exponential, for 4 columns."""
    found = benchmarks("machine_code").per_column(SASS, block=1024, threads=256)
    expected = {"loops": 1, "instructions": 1.0, "special": 0.25, "loaded": 4.0, "stored": 2.0}
    assert found == expected
