"""The Triton kernels compiled for GPUs that are not here, by the installed triton and by that of a
GPU image: no register spills, no float64, 16-byte accesses, and no more bytes than needed."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDER = ROOT / ".venv" / "triton-3.6"  # made by `make test`
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# bytes per column of a program, in bfloat16: a pair has two rows, of which a first pass reads the
# logits, and a second reads them and writes their gradients
LOADED = {
    "pair epilogue": 8,
    "row epilogue": 4,
    "token losses": 2,
    "mixup forward": 4,
    "mixup backward": 4,
    "mixed embeddings": 4,
}
STORED = {
    "pair epilogue": 4,
    "row epilogue": 2,
    "token losses": 0,
    "mixup forward": 0,
    "mixup backward": 4,
    "mixed embeddings": 2,
}
# exponentials per column: three log-sum-exps in each of the two passes, or one
EXPONENTIALS = {"pair epilogue": 6, "row epilogue": 2, "mixup backward": 1, "mixed embeddings": 0}


@functools.cache
def report_of(target, triton):
    """What benchmarks/machine_code.py finds. triton: installed, or 3.6."""
    paths = [str(OLDER)] if triton == "3.6" else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        done = subprocess.run(
            [sys.executable, "benchmarks/machine_code.py", "--targets", target, "--out", file],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(file.read_text())


# The older triton is that of GPU images. Its figures in docs/kernels.md are of sm_90; `make
# torture` compiles with both for all targets.
BUILDS = [("sm_90", "installed"), ("sm_100", "installed"), ("sm_90", "3.6")]
OTHER_BUILDS = [
    (target, triton)
    for target in TARGETS
    for triton in ("installed", "3.6")
    if (target, triton) not in BUILDS
]


@pytest.fixture(params=["installed", "3.6"])
def triton(request):
    if request.param == "3.6" and not OLDER.is_dir():
        pytest.skip(f"{OLDER.name} is not there: make .venv/triton-3.6")
    return request.param


@pytest.mark.parametrize(("target", "triton"), BUILDS, indirect=["triton"])
def test_kernels_compile_without_spills(target, triton):
    report = report_of(target, triton)
    expected = "3.6" if triton == "3.6" else importlib.metadata.version("triton")
    assert report["triton"].startswith(expected)
    kernels = report["kernels"][target]
    assert len(kernels) == 28
    for name, figures in kernels.items():
        assert figures["spilled"] == 0, (name, figures)
        assert not figures["float64"], name
        assert figures["wide_loads"], f"{name}: no 16-byte loads"
        if name.startswith(("mixup forward", "token losses")):  # a few numbers a row
            continue
        assert figures["wide_stores"], f"{name}: no 16-byte stores"


@pytest.mark.torture
@pytest.mark.parametrize(("target", "triton"), OTHER_BUILDS, indirect=["triton"])
def test_both_tritons_compile_for_every_target(target, triton):
    test_kernels_compile_without_spills(target, triton)
    if target.startswith("sm_"):
        test_kernels_move_the_bytes_that_they_must(target, triton)


@pytest.mark.parametrize(("target", "triton"), BUILDS, indirect=["triton"])
def test_kernels_move_the_bytes_that_they_must(target, triton):
    for name, figures in report_of(target, triton)["kernels"][target].items():
        kind = next(kind for kind in LOADED if name.startswith(kind))
        halved = 2 if "mixed already" in name else 1  # one row instead of two
        assert figures["loaded"] == LOADED[kind] / halved, (name, figures)
        assert figures["stored"] == STORED[kind] / halved, (name, figures)


def test_special_functions_are_the_exponentials_of_the_definition(triton):
    for name, figures in report_of("sm_90", triton)["kernels"]["sm_90"].items():
        kind = next((kind for kind in EXPONENTIALS if name.startswith(kind)), None)
        if kind is not None and "soft-capped" not in name:
            # and the few by which a running sum is scaled once per tile
            assert EXPONENTIALS[kind] <= figures["special"] <= 1.1 * EXPONENTIALS[kind], name
