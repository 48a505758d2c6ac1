"""The Triton kernels compiled for GPUs that are not here: no register spills, no float64, 16-byte
accesses."""

import json
import os
import subprocess
import sys

import pytest

COMPILE = """
import json, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import sftmix.kernels.mixed_embeddings_triton as embeddings
import sftmix.kernels.mixup_cross_entropy_triton as mixup
import sftmix.kernels.pair_epilogue_triton as epilogue

backend, architecture = sys.argv[1], sys.argv[2]
is_cuda = backend == "cuda"
target = GPUTarget(backend, int(architecture) if is_cuda else architecture, 32 if is_cuda else 64)
INTEGERS = ("labels_ptr", "pairs_ptr", "slots_ptr")
ROWS = (  # in bfloat16
    "logits_ptr", "c_ptr", "u_ptr", "d_c_ptr", "d_u_ptr", "rows_ptr", "mixed_ptr", "d_mixed_ptr",
    "d_rows_ptr",
)

def kind(name, constants):
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*i64" if name in INTEGERS else "*bf16" if name in ROWS else "*fp32"
    return "i64" if name.endswith("_stride") else "i32"

def report_of(kernel, num_warps, constants):
    names = kernel.arg_names
    aligned = [n for n in names if n.endswith(("_ptr", "_stride")) or n in ("V", "D")]
    divisible = [["tt.divisibility", 16]]
    attributes = {(names.index(n),): divisible for n in aligned if n not in constants}
    constexprs = {(names.index(n),): v for n, v in constants.items()}
    source = ASTSource(kernel, {n: kind(n, constants) for n in names}, constexprs, attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    if backend == "cuda":
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True).stdout
        found = {k: int(v) for k, v in re.findall(r"\\b(REG|STACK|LOCAL):(\\d+)", usage)}
        registers, spilled, double = found["REG"], found["STACK"] + found["LOCAL"], ".f64" in text
        wide = (rf"\\b{verb}\\.global\\S*\\.v4\\.b32" for verb in ("ld", "st"))
        loads, stores = (re.search(pattern, text) for pattern in wide)
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\\.vgpr_count:\\s*(\\d+)", text)[1])
        spilled = sum(int(n) for n in re.findall(r"\\.[sv]gpr_spill_count:\\s*(\\d+)", text))
        double = "_f64" in text
        wide = (rf"(global|buffer)_{verb}_dwordx4" for verb in ("load", "store"))
        loads, stores = (re.search(pattern, text) for pattern in wide)
    found = dict(registers=registers, spilled=spilled, float64=double)
    return dict(**found, wide_loads=bool(loads), wide_stores=bool(stores))

report = {}
of_logits = {"SCALE": 1.0, "ACCUMULATE": tl.float32}
for cap in (None, 30.0):
    for kernel in (epilogue._pair_kernel, epilogue._row_kernel):
        constants = {**of_logits, "CAP": cap, "WANT_GRADIENT": True, "BLOCK": epilogue.MAX_BLOCK}
        for smoothing, other in ((0.0, False), (0.1, True)):
            form = {"SMOOTHING": smoothing, "PER_ROW": other, "BY_PROBABILITY": other}
            name = f"epilogue {kernel.__name__} cap={cap} smoothing={smoothing}"
            report[name] = report_of(kernel, 8, {**constants, **form})
    forms = {"two members": {}, "mixed already": {"u_ptr": None, "d_u_ptr": None}}
    for form, absent in forms.items():
        for kernel in (mixup._forward_kernel, mixup._backward_kernel):
            missing = {n: v for n, v in absent.items() if n in kernel.arg_names}
            constants = {**of_logits, "CAP": cap, "BLOCK": mixup.MAX_BLOCK, **missing}
            report[f"mixup {kernel.__name__} {form} cap={cap}"] = report_of(kernel, 8, constants)
for kernel in (embeddings._forward_kernel, embeddings._backward_kernel):
    report[f"embeddings {kernel.__name__}"] = report_of(kernel, 4, {"BLOCK": embeddings.MAX_BLOCK})
print(json.dumps(report))
"""


@pytest.mark.parametrize(
    ("backend", "architecture"),
    [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")],
)
def test_kernels_compile_without_spills(backend, architecture, record_property):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, backend, architecture],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 18
    for kernel, figures in report.items():
        record_property(kernel, figures)
        print(architecture, kernel, figures)  # shown by pytest -s
        assert figures["spilled"] == 0, (kernel, figures)
        assert not figures["float64"], kernel
        assert figures["wide_loads"], f"{kernel}: no 16-byte loads"
        if not kernel.startswith("mixup _forward_kernel"):  # which stores three numbers a pair
            assert figures["wide_stores"], f"{kernel}: no 16-byte stores"
