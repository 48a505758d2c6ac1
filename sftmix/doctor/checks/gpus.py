"""GPUs as nvidia-smi sees them: memory errors, temperature, other processes, persistence, peer
access."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from sftmix.doctor.findings import Finding
from sftmix.errors import counted

ITEM = "GPUs"
HOT = 85  # degrees Celsius, near which clocks are lowered
SECONDS = 20.0
_COLUMNS = (
    "index,name,memory.total,memory.used,temperature.gpu,ecc.errors.uncorrected.volatile.total,"
    "persistence_mode,driver_version"
)


@dataclass(frozen=True)
class Gpu:
    """ecc_errors: uncorrected memory errors since the last restart; None if the GPU does not count
    them."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    temperature: int | None
    ecc_errors: int | None
    is_persistent: bool
    driver: str


def list_gpus() -> list[Gpu]:
    """Returns the GPUs that a run may use, by CUDA_VISIBLE_DEVICES; none without nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible == "":
        return []
    lines = _ask(f"--query-gpu={_COLUMNS}", "--format=csv,noheader,nounits")
    found = [_gpu([cell.strip() for cell in line.split(",")]) for line in lines]
    numbers = (visible or "").split(",")
    return (
        [gpu for gpu in found if str(gpu.index) in numbers]
        if all(number.isdecimal() for number in numbers)
        else found
    )


def check_health(gpus: list[Gpu]) -> list[Finding]:
    """Returns one finding per problem of a GPU, or one that all GPUs are well."""
    if not gpus:
        why = (
            "there is no nvidia-smi on this machine"
            if shutil.which("nvidia-smi") is None
            else "nvidia-smi shows no GPU that a run may use"
        )
        return [Finding(ITEM, "skipped", f"{why}.")]
    findings = [finding for gpu in gpus for finding in _troubles(gpu)]
    names = sorted({gpu.name for gpu in gpus})
    if len(names) > 1:
        findings.append(
            Finding(
                ITEM,
                "warning",
                f"of several kinds: {', '.join(names)}. All wait for the slowest.",
                "Use those of one kind.",
            )
        )
    if not all(gpu.is_persistent for gpu in gpus):
        found = (
            "persistence mode is off: the first process on a GPU waits for the driver to start it."
        )
        findings.append(Finding(ITEM, "warning", found, "Switch it on: sudo nvidia-smi -pm 1."))
    processes = _ask("--query-compute-apps=pid,used_memory", "--format=csv,noheader")
    if processes:
        remedy = "Wait for them, stop them, or leave out their GPUs (CUDA_VISIBLE_DEVICES)."
        findings.append(
            Finding(
                ITEM,
                "warning",
                f"other processes use them: pid {'; pid '.join(processes[:8])}.",
                remedy,
            )
        )
    findings += _peer_access(len(gpus))
    if any(finding.verdict != "ok" for finding in findings):
        return findings
    temperatures = [gpu.temperature for gpu in gpus if gpu.temperature is not None]
    hottest = f", at most {max(temperatures)} C" if temperatures else ""
    return [
        Finding(
            ITEM, "ok", f"{len(gpus)} x {names[0]}: no memory errors, no other processes{hottest}."
        ),
        *findings,
    ]


def _troubles(gpu: Gpu) -> list[Finding]:
    findings = []
    if gpu.ecc_errors:
        found = (
            f"GPU {gpu.index} has had {counted(gpu.ecc_errors, 'uncorrected memory error')}:"
            " results may be wrong."
        )
        findings.append(
            Finding(
                ITEM,
                "bad",
                found,
                "Leave it out (CUDA_VISIBLE_DEVICES) until it is reset or replaced.",
            )
        )
    if gpu.temperature is not None and gpu.temperature >= HOT:
        findings.append(
            Finding(
                ITEM,
                "warning",
                f"GPU {gpu.index} is at {gpu.temperature} C (from {HOT} C on it slows down).",
                "Look at its cooling.",
            )
        )
    return findings


def _peer_access(num_gpus: int) -> list[Finding]:
    """Checks whether each GPU can read the memory of the others. If not, NCCL uses host memory."""
    if num_gpus < 2:
        return []
    try:
        rows = _ask("topo", "-p2p", "r")
    except OSError:  # older drivers do not have the query
        return []
    cells = [
        cell
        for row in rows
        if row.strip().startswith("GPU")
        for cell in row.split()[1:]
        if not cell.startswith("GPU")
    ]
    blocked = sorted({cell for cell in cells if cell not in ("X", "OK")})
    if blocked:
        found = (
            f"not every GPU reads the others' memory directly ({', '.join(blocked)}): collectives"
            " go through the host."
        )
        return [
            Finding(
                "GPU peers",
                "warning",
                found,
                "Expect lower bandwidth; look at the topology: nvidia-smi topo -m.",
            )
        ]
    return (
        [Finding("GPU peers", "ok", "every GPU reads the others' memory directly.")]
        if cells
        else []
    )


def _gpu(cells: list[str]) -> Gpu:
    return Gpu(
        index=int(cells[0]),
        name=cells[1],
        total_bytes=int(cells[2]) * 2**20,
        used_bytes=int(cells[3]) * 2**20,
        temperature=int(cells[4]) if cells[4].isdecimal() else None,
        ecc_errors=int(cells[5]) if cells[5].isdecimal() else None,
        is_persistent=cells[6] != "Disabled",
        driver=cells[7],
    )


def _ask(*arguments: str) -> list[str]:
    """Returns the output lines of nvidia-smi. Raises OSError if it fails."""
    done = subprocess.run(
        ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        raise OSError(
            f"nvidia-smi ended with {done.returncode}:"
            f" {' '.join((done.stdout + done.stderr).split())[:300]}"
        )
    return [line for line in done.stdout.splitlines() if line.strip()]
