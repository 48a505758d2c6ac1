"""Energy that a training takes, from the counters of the hardware: NVML for NVIDIA GPUs; without a
GPU, RAPL for the processors of a machine, which counts whatever else they do."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

Counter = tuple[Callable[[], float], float]  # joules since any moment; where they wrap around
RAPL = Path("/sys/class/powercap")  # a folder per package, in a container often unreadable


class EnergyCounter:
    """Joules since they were last taken; NaN where the hardware does not say.

    device: of this rank. is_first: on its machine; on CPUs only this rank counts, for all of them.
    """

    def __init__(self, device: torch.device, *, is_first: bool, rapl: Path = RAPL):
        self._joules = 0.0
        if device.type == "cuda":
            self._counters = _of_gpu(device)
        else:
            self._counters = _of_processors(rapl) if is_first else [(lambda: 0.0, 0.0)]
        self._last = [read() for read, _ in self._counters]

    def add(self, joules: float) -> None:
        """Adds what an earlier attempt had counted."""
        self._joules += joules

    def read(self) -> float:
        """Returns the joules so far. Must be called before a counter of RAPL wraps around twice:
        every few minutes."""
        if not self._counters:
            return math.nan
        now = [read() for read, _ in self._counters]
        for before, after, (_, wraps_at) in zip(self._last, now, self._counters, strict=True):
            self._joules += after - before + (wraps_at if after < before else 0.0)
        self._last = now
        return self._joules

    def take(self) -> float:
        """Returns the joules so far, and begins again."""
        joules, self._joules = self.read(), 0.0
        return joules


def _of_gpu(device: torch.device) -> list[Counter]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:  # no such counter: a figure less, no reason to stop
        return []
    return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)]


def _of_processors(rapl: Path) -> list[Counter]:
    counters: list[Counter] = []
    for package in sorted(rapl.glob("intel-rapl:[0-9]*")):  # the name on AMD too
        if package.name.count(":") > 1:  # a part of a package
            continue
        path = package / "energy_uj"
        with contextlib.suppress(OSError, ValueError):
            _read_joules(path)
            wraps_at = _read_joules(package / "max_energy_range_uj")
            counters.append((partial(_read_joules, path), wraps_at))
    return counters


def _read_joules(path: Path) -> float:
    return int(path.read_text()) / 1e6
