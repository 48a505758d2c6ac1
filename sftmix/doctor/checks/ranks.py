"""Starts real ranks on this machine: check their gradients and measure the bandwidth between
them."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sftmix.cluster.local_ranks import first_failure, run_local_ranks
from sftmix.doctor.findings import Finding
from sftmix.errors import SftmixError, counted, gib
from sftmix.planning.states import Need

TOLERANCE = 1e-5
SLOW = 2e9  # bytes per second; a GPU on PCIe alone reaches several times as much
LIMIT_SECONDS = 120.0  # most of it is for starting Python; the test takes seconds

Result = dict[str, Any]


def run_ranks(
    num_ranks: int, wanted: list[str], *, on_gpus: bool, limit_seconds: float = LIMIT_SECONDS
) -> Result:
    """Returns the result of sftmix/doctor/self_test.py. Raises SftmixError if a rank fails or
    hangs."""
    environment = (
        {}
        if on_gpus
        else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    )
    with tempfile.TemporaryDirectory(prefix="sftmix-doctor-") as folder:
        command = [sys.executable, "-m", "sftmix.doctor.self_test", folder, *wanted]
        ends = run_local_ranks(
            command, num_ranks, limit_seconds=limit_seconds, environment=environment
        )
        failure = first_failure(ends)
        if failure is not None:
            last_lines = " | ".join(line.strip() for line in failure.splitlines()[-4:])
            raise SftmixError(
                f"{failure.splitlines()[0]} {last_lines[-400:]}. Training on this machine would end"
                " the same way: fix what it says. If it says nothing, look at the firewall of the"
                " loopback interface and at NCCL (NCCL_DEBUG=INFO)."
            )
        return json.loads((Path(folder) / "result.json").read_text())


def check_gradients(result: Result) -> list[Finding]:
    """Checks that ZeRO-3's gradients and the weights after a step equal those of one process."""
    item, found = "ZeRO-3 gradients", result["gradients"]
    shown = (
        f"{counted(result['num_ranks'], 'rank')} on {result['device']} against one process: largest"
        f" difference of a gradient {found['gradient']:.1e} (relative, {found['tensor']}), of a"
        f" weight after a step {found['weight']:.1e}; {found['seconds']:.1f} s."
    )
    if not (found["gradient"] <= TOLERANCE and found["weight"] <= TOLERANCE):  # or not a number
        remedy = (
            f"At most {TOLERANCE:.0e} is rounding. Do not train here: other versions of deepspeed,"
            " torch or NCCL may be right."
        )
        return [Finding(item, "bad", shown, remedy, found)]
    return [Finding(item, "ok", shown, facts=found)]


def check_bandwidth(result: Result, need: Need | None) -> list[Finding]:
    """Reports the speed of all-gather and reduce-scatter within this machine and, for a config,
    their time per step."""
    item, rows = "bandwidth", result["collectives"]
    speeds = [
        f"{row['bytes'] / 2**20:.0f} MiB: all-gather {row['bytes'] / row['all_gather'] / 1e9:.2f}"
        f" GB/s, reduce-scatter {row['bytes'] / row['reduce_scatter'] / 1e9:.2f} GB/s"
        for row in rows
    ]
    slow = []
    if result["device"] == "cuda" and rows[-1]["bytes"] / rows[-1]["all_gather"] < SLOW:
        remedy = (
            "Look at the topology (nvidia-smi topo -m) and at what NCCL chooses (NCCL_DEBUG=INFO)."
        )
        slow = [
            Finding(
                item,
                "warning",
                f"GPUs of one machine exchange less than {SLOW / 1e9:.0f} GB/s.",
                remedy,
            )
        ]
    library = "NCCL" if result["device"] == "cuda" else "gloo"
    shown = (
        f"{library}, {counted(result['num_ranks'], 'rank')} of this machine, whole tensors:"
        f" {'; '.join(speeds)}."
    )
    if need is None:
        return [Finding(item, "ok", shown, facts={"sizes": rows}), *slow]
    traffic, largest = need.step_traffic, rows[-1]
    seconds = (
        traffic["gather"] * largest["all_gather"] + traffic["reduce"] * largest["reduce_scatter"]
    ) / largest["bytes"]
    text = (
        f"{shown} A step of the config gathers {gib(traffic['gather'])} and reduces"
        f" {gib(traffic['reduce'])} (at most"
        f" {counted(need.num_micro_batches, 'micro-batch', 'micro-batches')}): {seconds:.2g} s at"
        " this speed, where nothing is computed meanwhile."
    )
    facts = {
        "sizes": rows,
        "step_seconds": seconds,
        **{f"{name}_bytes": value for name, value in traffic.items()},
    }
    return [Finding(item, "ok", text, facts=facts), *slow]
