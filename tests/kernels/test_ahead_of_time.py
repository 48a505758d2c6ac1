"""The Triton kernels compiled for GPUs that are not here: no register spills, no float64, 16-byte accesses."""

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
import sftmix.kernels.pair_epilogue_triton as module

backend, architecture = sys.argv[1], sys.argv[2]
target = GPUTarget(backend, int(architecture) if backend == "cuda" else architecture, 32 if backend == "cuda" else 64)
report = {}
for kernel in (module._pair_kernel, module._row_kernel):
    for cap in (None, 30.0):
        constants = {"SCALE": 1.0, "CAP": cap, "WANT_GRADIENT": True, "ACCUMULATE": tl.float32, "BLOCK": module.MAX_BLOCK}
        def kind(name):
            if name in constants:
                return "constexpr"
            if name.endswith("_ptr"):
                return {"logits_ptr": "*bf16", "labels_ptr": "*i64"}.get(name, "*fp32")
            return "i64" if name == "row_stride" else "i32"
        names = kernel.arg_names
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n in ("row_stride", "V")}
        source = ASTSource(kernel, {n: kind(n) for n in names}, {(names.index(n),): v for n, v in constants.items()}, attributes)
        compiled = triton.compile(source, target=target, options={"num_warps": 8})
        if backend == "cuda":
            text = compiled.asm["ptx"]
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True).stdout
            found = {k: int(v) for k, v in re.findall(r"\\b(REG|STACK|LOCAL):(\\d+)", usage)}
            registers, spilled = found["REG"], found["STACK"] + found["LOCAL"]
            float64, wide = ".f64" in text, "ld.global.v4.b32" in text and "st.global.v4.b32" in text
        else:
            text = compiled.asm["amdgcn"]
            registers = int(re.search(r"\\.vgpr_count:\\s*(\\d+)", text)[1])
            spilled = sum(int(n) for n in re.findall(r"\\.[sv]gpr_spill_count:\\s*(\\d+)", text))
            float64, wide = "_f64" in text, "global_load_dwordx4" in text or "buffer_load_dwordx4" in text
        report[f"{kernel.__name__} cap={cap}"] = dict(registers=registers, spilled=spilled, float64=float64, wide=wide)
print(json.dumps(report))
"""


@pytest.mark.parametrize(("backend", "architecture"), [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")])
def test_kernels_compile_without_spills(backend, architecture, record_property):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, backend, architecture], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report) == 4
    for kernel, figures in report.items():
        record_property(kernel, figures)
        print(architecture, kernel, figures)  # shown by pytest -s
        assert figures["spilled"] == 0, (kernel, figures)
        assert not figures["float64"], kernel
        assert figures["wide"], f"{kernel}: no 16-byte loads and stores"
