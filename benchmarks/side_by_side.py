"""What the benchmarks share: rounds in rotating order, percentiles, and the record of machine and
versions."""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sftmix.storage import provenance


def rounds(
    functions: dict[str, Callable[[int], Any]], *, num_rounds: int, device: torch.device
) -> Iterator[dict[str, tuple[float, Any]]]:
    """Calls every function once a round, with the round's number, and yields name -> (seconds,
    result) of the round.

    The order rotates, so that drift of clocks and load falls on all of them. Seconds end when the
    device is idle.
    """
    names = list(functions)
    for number in range(num_rounds):
        measured: dict[str, tuple[float, Any]] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            _wait_for(device)
            start = time.perf_counter()
            result = functions[name](number)
            _wait_for(device)
            measured[name] = time.perf_counter() - start, result
        yield measured


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Returns the 20th, 50th and 80th percentile of at least two values."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


def machine(device: torch.device, script: str, *, packages: Iterable[str] = ()) -> dict[str, Any]:
    """Returns hardware, its load at this moment, versions (also of further `packages`) and command,
    for the record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else provenance.processor()
    found = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
    return {
        "device": name,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "versions": provenance.versions() | found,
        "commit": provenance.commit(),
        # a folder of this machine says nothing elsewhere
        "command": " ".join(
            [
                "python",
                script,
                *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]),
            ]
        ),
    }


def peak_bytes_of(function: Callable[[], Any], device: torch.device) -> int:
    """Returns the bytes that a call adds at its peak: of GPU memory, or on a CPU (Linux) of the
    resident set."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = _resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    function()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(key: str) -> int:
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return 1024 * int(line.split()[1])
