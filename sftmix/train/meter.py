"""Meter of a training stage: seconds by activity, and tokens per second.

Every second since the meter's creation belongs to one activity, so the activities add up to the
time that the user waited. Token rates use only the seconds of `training`. A window is the time
since the last line of the log; the windows add up to the totals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

TOKEN_KINDS = ("real", "response", "padded")
TRAINING, EVALUATION, CHECKPOINT, OTHER = ACTIVITIES = (
    "training",
    "evaluation",
    "checkpoint",
    "other",
)
TIMED = (TRAINING, EVALUATION, CHECKPOINT)  # the other activity is what is left


class Meter:
    """Counts seconds by activity, and tokens. It begins in `other`.

    seconds: of each activity. window_seconds: of training, since the last line. window_tokens: of
    this rank, since the last line. tokens: of all ranks, up to the last line.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock, self._read_at, self._activity = clock, clock(), OTHER
        self.seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self.tokens = dict.fromkeys(TOKEN_KINDS, 0.0)
        self.window_seconds = 0.0
        self.window_tokens = dict.fromkeys(TOKEN_KINDS, 0.0)

    def read(self) -> None:
        """Adds the seconds since the last reading to the current activity."""
        now = self.clock()
        self.seconds[self._activity] += now - self._read_at
        if self._activity == TRAINING:
            self.window_seconds += now - self._read_at
        self._read_at = now

    def switch(self, activity: str) -> None:
        """Starts another activity. The GPU must have finished the current one."""
        self.read()
        self._activity = activity

    @contextmanager
    def during(self, activity: str) -> Iterator[None]:
        """Counts the seconds inside for another activity, then returns to the current one."""
        before = self._activity
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def end_window(self, tokens: Mapping[str, float]) -> tuple[float, dict[str, float]]:
        """Ends the window at the last reading. tokens: of all ranks in it. Returns its seconds, and
        its tokens per second."""
        seconds, rates = self.window_seconds, rates_of(tokens, self.window_seconds)
        for kind, count in tokens.items():
            self.tokens[kind] += count
        self.window_seconds, self.window_tokens = 0.0, dict.fromkeys(TOKEN_KINDS, 0.0)
        return seconds, rates

    def facts(self) -> dict[str, float]:
        """Returns the stage's seconds, tokens and tokens per second, up to this moment."""
        self.read()
        named = {f"{activity}_seconds": self.seconds[activity] for activity in TIMED}
        rates = {
            f"{kind}_tokens_per_second": rate
            for kind, rate in rates_of(self.tokens, self.seconds[TRAINING]).items()
        }
        counts = {f"num_{kind}_tokens": round(self.tokens[kind]) for kind in TOKEN_KINDS}
        return {**named, "waited_seconds": sum(self.seconds.values()), **rates, **counts}


# the head is a part of the forward; communication (also the wait for slower ranks) one of all
PARTS = ("forward", "head", "backward", "optimiser", "communication")


class PartTimer:
    """Seconds of the parts of steps, since they were last taken. On a GPU they are measured on the
    device, without waiting for it."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._is_gpu, self._clock = device.type == "cuda", clock
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Counts the time inside for a part."""
        if not self._is_gpu:
            started = self._clock()
            yield
            self._seconds[part] += self._clock() - started
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((part, first, last))

    def take(self) -> dict[str, float]:
        """Returns the seconds of each part, and begins again. A GPU must have finished."""
        for part, first, last in self._events:
            self._seconds[part] += first.elapsed_time(last) / 1000
        taken, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        self._events = []
        return taken


class StepTrace:
    """A trace of some steps by torch's profiler, written to a file that Perfetto opens.

    steps: first and last; None for no trace.
    """

    def __init__(self, steps: tuple[int, int] | None, path: Path, device: torch.device):
        self._steps, self._path = steps, path
        kinds = torch.profiler.ProfilerActivity
        self._activities = [kinds.CPU, *([kinds.CUDA] if device.type == "cuda" else [])]
        self._profile: torch.profiler.profile | None = None

    def begin_step(self, step: int) -> None:
        """Starts the trace before its first step, or in the middle of it after a resumption."""
        if self._profile is None and self._steps and self._steps[0] <= step <= self._steps[1]:
            self._profile = torch.profiler.profile(activities=self._activities)
            self._profile.start()

    def end_step(self, step: int, *, is_last: bool) -> None:
        """Writes the trace after its last step, or after the last one of the training."""
        if self._profile is not None and self._steps and (step >= self._steps[1] or is_last):
            self._profile.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._path))
            print(f"  trace of steps {self._steps[0]} to {step}: {self._path}", flush=True)
            self._profile = self._steps = None


def tokens_of(facts: Mapping[str, float]) -> str:
    """Returns the tokens that a stage trained on, padding apart, as text."""
    return f"{facts['num_real_tokens']:,.0f}" if "num_real_tokens" in facts else "-"


def watt_hours_of(facts: Mapping[str, float]) -> str:
    """Returns the energy that a stage's training took, as text; "-" if no counter told it."""
    return f"{facts['energy_joules'] / 3600:,.3g}" if "energy_joules" in facts else "-"


NAMES = {
    TRAINING: "training",
    EVALUATION: "evaluation",
    CHECKPOINT: "checkpoints and exports",
    OTHER: "start and end",
}


def describe_time(facts: Mapping[str, float]) -> str:
    """Returns one line with a stage's minutes by activity. facts: those of `Meter.facts`."""
    minutes = minutes_of(facts)
    shown = ", ".join(f"{name} {minutes[activity]:.2f}" for activity, name in NAMES.items())
    return f"{minutes['waited']:.2f} min: {shown}"


def minutes_of(facts: Mapping[str, float]) -> dict[str, float]:
    """Returns a stage's minutes by activity, and those that the user waited. facts: those of
    `Meter.facts`."""
    minutes = {name: facts.get(f"{name}_seconds", 0.0) / 60 for name in TIMED}
    waited = facts["waited_seconds"] / 60
    return {**minutes, OTHER: max(0.0, waited - sum(minutes.values())), "waited": waited}


def rates_of(tokens: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Returns tokens per second of each kind; NaN if no time has passed."""
    return {
        kind: count / seconds if seconds > 0 else float("nan") for kind, count in tokens.items()
    }
