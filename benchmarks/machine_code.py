"""The Triton kernels as machine code of GPUs that need not be here.

    python benchmarks/machine_code.py [--targets sm_80 sm_90 sm_100 gfx942] [--out FILE.json]

Compiles every kernel for each GPU and reads the result: registers, spills, float64, 16-byte
accesses; for NVIDIA's GPUs also what a loop over the columns does per column: instructions of a
thread, calls of the special function unit (exponential, tanh), bytes read and written. From these
`seconds_on_h100` gives the least time that a launch can take: whichever is slowest of memory, issue
and special functions. Latency, the tail of the grid and the L2 cache are not in it.

Axes: D hidden size, V vocabulary; columns are those of D or V.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sftmix.kernels.mixed_embeddings_triton as embeddings
import sftmix.kernels.mixup_cross_entropy_triton as mixup
import sftmix.kernels.pair_epilogue_triton as epilogue
from sftmix.planning.hardware import PRODUCT_SECONDS, gpu

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
INTEGERS = ("labels_ptr", "pairs_ptr", "slots_ptr")
ROWS = (  # in bfloat16
    "logits_ptr",
    "c_ptr",
    "u_ptr",
    "d_c_ptr",
    "d_u_ptr",
    "rows_ptr",
    "mixed_ptr",
    "d_mixed_ptr",
    "d_rows_ptr",
)
LANES = 32  # threads of a warp
# H100 SXM, of NVIDIA's data sheet and the CUDA programming guide (throughput per multiprocessor)
MULTIPROCESSORS = 132
SCHEDULERS = 4  # each issues an instruction of a warp per cycle
SPECIAL_LANES = 16  # exponentials per cycle
CLOCK = 989.4e12 / (MULTIPROCESSORS * 4096)  # Hz at which the sheet's dense bf16 rate is reached
SOFTCAP = 30.0


class Launch(NamedTuple):
    """A kernel with its compile-time arguments."""

    kernel: Any
    num_warps: int
    constants: dict[str, Any]


def launches() -> dict[str, Launch]:
    """Returns every kernel in each form that training and scoring use."""
    found: dict[str, Launch] = {}
    of_logits = {"SCALE": 1.0, "ACCUMULATE": tl.float32}
    plain = {"SMOOTHING": 0.0, "PER_ROW": False, "BY_PROBABILITY": False}
    forms = {
        "": plain,
        ", smoothed": {**plain, "SMOOTHING": 0.1},
        ", by probability": {**plain, "BY_PROBABILITY": True},
        ", all at once": {"SMOOTHING": 0.1, "PER_ROW": True, "BY_PROBABILITY": True},
    }
    for cap in (None, SOFTCAP):
        capped = "" if cap is None else ", soft-capped"
        common = {**of_logits, "CAP": cap, "BLOCK": epilogue.MAX_BLOCK}
        for form, constants in forms.items():
            trained = {**common, **constants, "WANT_GRADIENT": True}
            found[f"pair epilogue{form}{capped}"] = Launch(epilogue._pair_kernel, 8, trained)
            found[f"row epilogue{form}{capped}"] = Launch(
                epilogue._row_kernel, 8, {**trained, "WANT_MATCH": False}
            )
        scored = {**common, **plain, "WANT_GRADIENT": False, "WANT_MATCH": True}
        found[f"token losses{capped}"] = Launch(epilogue._row_kernel, 8, scored)
        common = {**of_logits, "CAP": cap, "BLOCK": mixup.MAX_BLOCK}
        for form, absent in {"": (), ", mixed already": ("u_ptr", "d_u_ptr")}.items():
            for name, kernel in (
                ("forward", mixup._forward_kernel),
                ("backward", mixup._backward_kernel),
            ):
                missing = {n: None for n in absent if n in kernel.arg_names}
                found[f"mixup {name}{form}{capped}"] = Launch(kernel, 8, {**common, **missing})
    tile = {"BLOCK": embeddings.MAX_BLOCK}
    found["mixed embeddings forward"] = Launch(embeddings._forward_kernel, 4, tile)
    found["mixed embeddings backward"] = Launch(embeddings._backward_kernel, 4, tile)
    return found


def compiled(launch: Launch, target: str) -> Any:
    """Returns what Triton makes of a kernel for a GPU such as `sm_90` or `gfx942`."""
    is_cuda = target.startswith("sm_")
    gpu_target = GPUTarget(
        "cuda" if is_cuda else "hip",
        int(target.removeprefix("sm_")) if is_cuda else target,
        32 if is_cuda else 64,
    )
    names, constants = launch.kernel.arg_names, launch.constants
    # Sizes of real models are multiples of 16, which Triton finds out at run time.
    aligned = [n for n in names if n.endswith(("_ptr", "_stride")) or n in ("V", "D")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(
        launch.kernel,
        {name: _kind(name, constants) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {place: a for place, a in attributes.items() if names[place[0]] not in constants},
    )
    return triton.compile(source, target=gpu_target, options={"num_warps": launch.num_warps})


def _kind(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name == "match_ptr":
        return "*i8"
    if name.endswith("_ptr"):
        return "*i64" if name in INTEGERS else "*bf16" if name in ROWS else "*fp32"
    return "i64" if name.endswith("_stride") else "i32"


def report_of(launch: Launch, target: str) -> dict[str, Any]:
    """Returns registers, spilled (bytes on NVIDIA, registers on AMD), float64, wide_loads,
    wide_stores; for NVIDIA also what `per_column` does."""
    assembly = compiled(launch, target).asm
    if not target.startswith("sm_"):
        text = assembly["amdgcn"]
        return {
            "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1]),  # type: ignore[index]
            "spilled": sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))),
            "float64": "_f64" in text,
            "wide_loads": bool(re.search(r"(global|buffer)_load_dwordx4", text)),
            "wide_stores": bool(re.search(r"(global|buffer)_store_dwordx4", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run(
                [triton.knobs.nvidia.cuobjdump.path, option, file.name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "float64": ".f64" in assembly["ptx"],
        "wide_loads": bool(re.search(r"\bld\.global\S*\.v4\.b32", assembly["ptx"])),
        "wide_stores": bool(re.search(r"\bst\.global\S*\.v4\.b32", assembly["ptx"])),
        **per_column(sass, launch.constants["BLOCK"], LANES * launch.num_warps),
    }


class Instruction(NamedTuple):
    """address: in bytes. name: with its modifiers. target: of a branch."""

    address: int
    name: str
    target: int | None


def instructions_of(sass: str) -> list[Instruction]:
    """Returns the instructions of one kernel as `cuobjdump -sass` prints them."""
    found = []
    form = r"/\*([0-9a-f]{4,})\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"
    for address, name, operands in re.findall(form, sass):
        branch = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        found.append(Instruction(int(address, 16), name, int(branch[1], 16) if branch else None))
    return found


def loops_of(instructions: list[Instruction]) -> Iterator[list[Instruction]]:
    """Yields the loops: from the target of a jump backwards to the jump."""
    for each in instructions:
        if each.target is not None and each.target < each.address:
            yield [i for i in instructions if each.target <= i.address <= each.address]


def per_column(sass: str, block: int, threads: int) -> dict[str, float]:
    """Returns per column of a program, over all of its loops: instructions (of a thread), special
    (functions), loaded and stored (bytes). A pass of a loop handles `block` columns."""
    loops = list(loops_of(instructions_of(sass)))
    body = [instruction for loop in loops for instruction in loop]
    each = {i.address for i in body}
    if not loops or len(each) != len(body):
        raise ValueError(f"{len(loops)} loops over the columns, which must be apart")
    share = threads / block
    return {
        "loops": len(loops),
        "instructions": share * sum(not i.name.startswith("NOP") for i in body),
        "special": share * sum(i.name.startswith("MUFU") for i in body),
        "loaded": share * sum(map(_width, (i.name for i in body if i.name.startswith("LDG")))),
        "stored": share * sum(map(_width, (i.name for i in body if i.name.startswith("STG")))),
    }


def _width(name: str) -> int:
    """Returns the bytes of a load or store of a thread."""
    parts = name.split(".")
    if "128" in parts:
        return 16
    if "64" in parts:
        return 8
    return 2 if parts[-1] in ("U16", "S16") else 1 if parts[-1] in ("U8", "S8") else 4


def seconds_on_h100(report: dict[str, Any], *, programs: int, columns: int) -> dict[str, float]:
    """Returns the least seconds of a launch by memory, issue and special functions. report: of
    sm_90."""
    passes = programs * columns
    h100 = gpu("H100", interconnect=3200, gpus_per_node=8)
    per_cycle = MULTIPROCESSORS * CLOCK
    return {
        "memory": passes * (report["loaded"] + report["stored"]) / h100.moved,
        "issue": passes * report["instructions"] / (LANES * SCHEDULERS * per_cycle),
        "special": passes * report["special"] / (SPECIAL_LANES * per_cycle),
    }


def bound_of(report: dict[str, Any], *, programs: int, columns: int) -> float:
    """Returns the least seconds of a launch, with its start."""
    seconds = seconds_on_h100(report, programs=programs, columns=columns)
    return max(seconds.values()) + PRODUCT_SECONDS


def table(content: dict[str, Any], *, rows: int, columns: int, width: int) -> list[str]:
    """Returns the table of docs/kernels.md: sm_90 per column, and the least time for so many rows
    of logits of `columns`, or of hidden states of `width`."""
    lines = [
        "| kernel | registers | instructions | special | bytes read, written | bound by | ms |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, report in content["kernels"]["sm_90"].items():
        is_of_rows = name.startswith(("row", "token", "mixed embeddings backward"))
        programs = rows if is_of_rows else rows // 2
        wide = width if name.startswith("mixed embeddings") else columns
        seconds = seconds_on_h100(report, programs=programs, columns=wide)
        bound = max(seconds, key=lambda each: seconds[each])
        lines.append(
            f"| {name} | {report['registers']} | {report['instructions']:.1f}"
            f" | {report['special']:.1f} | {report['loaded']:g}, {report['stored']:g} | {bound}"
            f" | {1e3 * bound_of(report, programs=programs, columns=wide):.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    content: dict[str, Any] = {
        "command": "python benchmarks/machine_code.py",
        "triton": triton.__version__,
        "kernels": {
            target: {name: report_of(launch, target) for name, launch in launches().items()}
            for target in options.targets
        },
    }
    for target, reports in content["kernels"].items():
        print(target)
        for name, report in reports.items():
            cells = [
                f"{key} {value:.3g}"
                for key, value in report.items()
                if not isinstance(value, bool) and key != "loops"
            ]
            print(f"  {name:44s} {', '.join(cells)}")
    if options.out is not None:
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
