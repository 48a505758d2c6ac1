"""Metrics of a training stage: JSON lines, TensorBoard, trackers, and output on the terminal.

A terminal gets a progress bar; a log file gets one plain line every N steps. Losses are in nats:
per response token (NTP), per mixed position (Mixup). Tokens per second of training
(`sftmix/train/meter.py`) are counted three ways: real (no padding), response (those that carry
loss) and padded (what the transformer computed).
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.batches.balance import Balance
from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.cluster.liveness.progress import progress_bar
from sftmix.engine.ranks import Ranks
from sftmix.storage.failures import accessing, describe
from sftmix.storage.files import write_text
from sftmix.train.energy import EnergyCounter
from sftmix.train.held_out import HeldOutLoss
from sftmix.train.meter import (
    ACTIVITIES,
    CHECKPOINT,
    OTHER,
    PARTS,
    TOKEN_KINDS,
    TRAINING,
    Meter,
    PartTimer,
)
from sftmix.train.trackers import Trackers

if TYPE_CHECKING:
    from sftmix.loss.flops import ModelFlops
    from sftmix.loss.requests import LossResult

NTP = "loss/ntp (nats/token)"
MIXUP = "loss/mixup (nats/position)"
AUXILIARY = "loss/router (nats)"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "learning_rate"
LAM = "mixup/lam (mean)"
COVERAGE = "mixup/coverage (share)"
USEFUL = "ranks/useful (share)"
IMBALANCE = "ranks/slowest (ratio)"
REAL_RATE = "tokens/real (tokens/s)"
RESPONSE_RATE = "tokens/response (tokens/s)"
PADDED_RATE = "tokens/padded (tokens/s)"
RATE_PER_RANK = "tokens/real per rank (tokens/s)"
MODEL_FLOPS = "flops/model per rank (TFLOP/s)"
HARDWARE_FLOPS = "flops/hardware per rank (TFLOP/s)"
MFU = "flops/mfu (share)"
HFU = "flops/hfu (share)"
PEAK_MEMORY = "memory/peak (GiB)"
RESERVED_MEMORY = "memory/reserved (GiB)"
RETRIES = "memory/allocator retries (count)"
PART_TIMES = {part: f"time/{part} (s)" for part in PARTS}
TRAINING_TIME = "time/training (s)"
WAITING_TIME = "time/waiting for batches (s)"
COLLECTOR_TIME = "time/garbage collection (s)"
SKIPPED = "steps/skipped (steps)"
HELD_OUT = "held_out/loss (nats/token)"
HELD_OUT_EXACT = "held_out/exact match (share)"

# TensorBoard and trackers: key of a line -> tag and description. Every run has the same tags, so
# that curves of several runs overlay.
_MEAN = "mean over the steps since the last point."
_RATE = "per second of training since the last point, on all ranks"
SCALARS = {
    NTP: ("loss/ntp", f"Next-token loss in nats per response token, {_MEAN}"),
    MIXUP: ("loss/mixup", f"Mixup loss in nats per mixed position, {_MEAN}"),
    AUXILIARY: ("loss/router", f"Router loss in nats, {_MEAN}"),
    GRAD_NORM: ("grad_norm", "Norm of the gradient before clipping, at this step."),
    LEARNING_RATE: ("learning_rate", "Learning rate at this step."),
    LAM: ("mixup/lam", f"Share of the confident example in a mixed pair, {_MEAN}"),
    COVERAGE: ("mixup/coverage", f"Share of response tokens that take part in a mix, {_MEAN}"),
    USEFUL: (
        "ranks/useful",
        f"Share of the ranks' time for real tokens if all wait for the slowest, by FLOPs, {_MEAN}",
    ),
    IMBALANCE: ("ranks/slowest", f"Work of the slowest rank over the mean one, {_MEAN}"),
    REAL_RATE: ("tokens_per_second/real", f"Tokens without padding {_RATE}."),
    RESPONSE_RATE: ("tokens_per_second/response", f"Response tokens {_RATE}."),
    PADDED_RATE: ("tokens_per_second/padded", f"Tokens with padding {_RATE}."),
    RATE_PER_RANK: (
        "tokens_per_second/real_per_rank",
        f"Tokens without padding {_RATE}, over the number of ranks.",
    ),
    MODEL_FLOPS: (
        "flops/model",
        "TFLOP/s of a rank for real tokens, without recomputation (docs/packing.md), since the last"
        " point.",
    ),
    HARDWARE_FLOPS: ("flops/hardware", "The same with padding and recomputation."),
    MFU: ("flops/mfu", "Model FLOP/s over the device's dense peak in half precision."),
    HFU: ("flops/hfu", "Hardware FLOP/s over the same peak."),
    PEAK_MEMORY: ("memory/peak", "Largest memory of any rank so far, in GiB: of its GPU, or host."),
    RESERVED_MEMORY: ("memory/reserved", "Memory that torch holds on a GPU, in GiB; largest rank."),
    RETRIES: ("memory/retries", "Times that torch freed its cache to find memory; all ranks."),
    **{
        key: (f"seconds/{part}", f"Seconds of the {part}, since the last point; mean of the ranks.")
        for part, key in PART_TIMES.items()
    },
    TRAINING_TIME: (
        "seconds/training",
        "Seconds of training since the last point, without checkpoints.",
    ),
    WAITING_TIME: (
        "seconds/waiting_for_batches",
        "Seconds of training in which a rank waited for its batches, since the last point; mean.",
    ),
    COLLECTOR_TIME: (
        "seconds/garbage_collection",
        "Seconds of Python's garbage collector since the last point; mean over the ranks.",
    ),
    SKIPPED: ("steps/skipped", "Steps skipped so far."),
    HELD_OUT: ("held_out/loss", "Loss of the held-out examples in nats per response token."),
    HELD_OUT_EXACT: (
        "held_out/exact_match",
        "Share of the held-out examples whose response greedy decoding would produce.",
    ),
}
LOSSES = ("ntp", "mixup", "auxiliary")  # the keys that are summed
PAUSES = ("waiting", "collector")  # seconds of this rank, summed over the steps of a window
# summed over the steps of a window; all ranks have the same
WINDOW = ("steps", "lam", "num_lam", "num_ntp_tokens", "num_mixup_tokens", *Balance._fields)


class RunLog:
    """Collects the metrics of one training stage. `metrics` is the JSONL file; only rank 0 writes
    or prints.

    trackers: used on rank 0. meter: started with the stage. parts: times the parts of steps. flops:
    of the model. peak_flops: of the device, in FLOP/s; None if unknown. Windowed values are means
    over the steps since the last line. All ranks must call every method.
    """

    def __init__(
        self,
        stage: str,
        ranks: Ranks,
        *,
        metrics: Path,
        tensorboard: Path | None,
        trackers: Trackers | None = None,
        every_steps: int,
        has_mixup: bool,
        has_router: bool,
        meter: Meter | None = None,
        parts: PartTimer | None = None,
        flops: ModelFlops | None = None,
        peak_flops: float | None = None,
    ):
        self.stage, self.ranks, self.every_steps = stage, ranks, every_steps
        self.has_mixup, self.has_router = has_mixup, has_router
        self.meter = meter or Meter()
        self._parts, self._flops, self._peak_flops = parts, flops, peak_flops
        self.num_skipped = 0
        self.num_steps = 0
        self.joules = 0.0  # of all ranks, up to the last line; NaN if unknown
        self._energy = EnergyCounter(ranks.device, is_first=ranks.local_rank == 0)
        self._metrics, self._tensorboard = metrics, tensorboard
        self._trackers = trackers if ranks.is_main else None
        self._file: Any = None
        self._writer: Any = None
        self._bar: Any = None
        self._balance = Balance(0.0, 0.0, 0.0)  # of the whole stage
        self._clear()

    def progress(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Returns the running sums of this rank, to resume from: see
        `sftmix/train/resuming.py`."""
        self.meter.read()
        own = dict(zip(LOSSES, self._losses.tolist(), strict=True))
        own |= self.meter.window_tokens | self._pauses | {"joules": self._energy.read()}
        shared = {
            **{f"total_{kind}": count for kind, count in self.meter.tokens.items()},
            **{f"{activity}_seconds": seconds for activity, seconds in self.meter.seconds.items()},
            "window_seconds": self.meter.window_seconds,
            "num_skipped": self.num_skipped,
            "total_joules": self.joules,
            **{f"window_{name}": value for name, value in self._window.items()},
            **{f"balance_{name}": value for name, value in self._balance._asdict().items()},
        }
        return {**own, **shared}, {}

    def restore(
        self, step: int, numbers: list[dict[str, float]], arrays: dict[str, NDArray[np.float64]]
    ) -> None:
        """Restores the sums that all ranks saved. Removes lines of steps that will be repeated."""
        mine = numbers[min(self.ranks.rank, len(numbers) - 1)]
        own = {name: mine[name] for name in (*LOSSES, *TOKEN_KINDS, *PAUSES)}
        own["joules"] = mine.get("joules", math.nan)  # a state of an earlier version has none
        if len(numbers) != self.ranks.world_size:  # on other ranks: the first rank has all sums
            own = {
                name: sum(row.get(name, math.nan) for row in numbers) if self.ranks.is_main else 0.0
                for name in own
            }
        self._losses = torch.tensor(
            [own[name] for name in LOSSES], dtype=torch.float64, device=self.ranks.device
        )
        self.meter.window_tokens = {kind: own[kind] for kind in TOKEN_KINDS}
        self._pauses = {name: own[name] for name in PAUSES}
        self._energy.add(own["joules"])
        self.joules = mine.get("total_joules", math.nan)
        self.meter.window_seconds = mine["window_seconds"]
        for kind in TOKEN_KINDS:
            self.meter.tokens[kind] = mine[f"total_{kind}"]
        for activity in ACTIVITIES:
            # in addition to the time of this attempt so far
            self.meter.seconds[activity] += mine.get(f"{activity}_seconds", 0.0)
        self.num_skipped = int(mine["num_skipped"])
        self._window = {name: mine[f"window_{name}"] for name in WINDOW}
        self._balance = Balance(*(mine[f"balance_{name}"] for name in Balance._fields))
        if self.ranks.is_main and self._metrics.is_file():
            lines = [line for line in read_metrics(self._metrics) if line["step"] <= step]
            write_text(self._metrics, "".join(json.dumps(line) + "\n" for line in lines))

    def start(self, *, num_steps: int, after: int = 0) -> None:
        """Starts measuring at the step after `after`."""
        self.num_steps = num_steps
        if self.ranks.is_main:
            self._file = self._metrics.open("a" if after else "w", encoding="utf-8")
        if self.ranks.is_main and self._tensorboard is not None:
            if not after:
                # from an earlier attempt: its curves would overlay these
                shutil.rmtree(self._tensorboard, ignore_errors=True)
            with self._tensorboard_may_fail():
                self._writer = _summary_writer(
                    self._tensorboard, purge_step=after + 1 if after else None
                )
        if self._trackers is not None:
            self._trackers.start(resumes=after > 0)
        if self.ranks.is_main and sys.stdout.isatty():
            self._bar = progress_bar()
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=num_steps, completed=after, info="")
        self.meter.switch(TRAINING)

    def add(self, batch: MicroBatch, loss: LossResult) -> None:
        """Adds one micro-batch. Tensors are only summed, without synchronising with the device."""
        self._losses += torch.stack([loss.ntp, loss.mixup, loss.auxiliary]).double()
        if batch.indices:
            self.meter.window_tokens["real"] += batch.num_real_tokens
            self.meter.window_tokens["response"] += batch.labels.numel()
        self.meter.window_tokens["padded"] += batch.input_ids.numel()

    def end_step(
        self,
        step: int,
        *,
        counts: StepCounts,
        balance: Balance,
        lam: NDArray[np.float64],
        learning_rate: float,
        grad_norm: float | torch.Tensor,
        is_skipped: bool,
        epoch: int,
        held_out: HeldOutLoss | None = None,
        is_last: bool = False,
    ) -> None:
        """Ends an optimiser step; writes a line every `every_steps` steps, at the last one, and
        with every held-out loss. is_last: the training ends here, before its last planned step."""
        self._balance = self._balance.plus(balance)
        added = {"steps": 1, "lam": float(lam.sum()), "num_lam": len(lam)}
        for name, value in {**added, **vars(counts), **balance._asdict()}.items():
            self._window[name] += value
        self.num_skipped += is_skipped
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        is_last = is_last or step == self.num_steps
        if step % self.every_steps and not is_last and held_out is None:
            return
        losses = self._losses.cpu()  # synchronises with the device before the clock is read
        self.meter.switch(OTHER if is_last else TRAINING)
        own = {**self.meter.window_tokens, **self._pauses, "joules": self._energy.take()}
        own |= self._parts.take() if self._parts is not None else {}
        of_rank = torch.tensor(list(own.values())).double()
        sums = dict(
            zip(
                (*LOSSES, *own),
                self.ranks.sum(torch.cat([losses, of_rank])).tolist(),
                strict=True,
            )
        )
        ntp, mixup, auxiliary = (sums[name] for name in LOSSES)
        seconds, rates = self.meter.end_window({kind: sums[kind] for kind in TOKEN_KINDS})
        self.joules += sums["joules"]
        window = self._window
        line: dict[str, float] = {"step": step, "epoch": epoch, NTP: ntp / window["steps"]}
        if self.has_mixup:
            line[MIXUP] = mixup / window["steps"]
            line[LAM] = window["lam"] / window["num_lam"] if window["num_lam"] else float("nan")
            line[COVERAGE] = 2 * window["num_mixup_tokens"] / max(1, window["num_ntp_tokens"])
        if self.has_router:
            line[AUXILIARY] = auxiliary / window["steps"]
        of_window = Balance(*(window[name] for name in Balance._fields))
        line |= {
            GRAD_NORM: float(grad_norm),
            LEARNING_RATE: learning_rate,
            REAL_RATE: rates["real"],
            RESPONSE_RATE: rates["response"],
            PADDED_RATE: rates["padded"],
            USEFUL: of_window.useful_share(self.ranks.world_size),
            IMBALANCE: of_window.imbalance(self.ranks.world_size),
            TRAINING_TIME: seconds,
            RATE_PER_RANK: rates["real"] / self.ranks.world_size,
            **self._speed(of_window, window["num_ntp_tokens"], seconds),
            **memory_of(self.ranks),
            **{
                key: sums[part] / self.ranks.world_size
                for part, key in PART_TIMES.items()
                if part in sums
            },
            WAITING_TIME: sums["waiting"] / self.ranks.world_size,
            COLLECTOR_TIME: sums["collector"] / self.ranks.world_size,
            SKIPPED: self.num_skipped,
        }
        if held_out is not None:
            line |= {HELD_OUT: held_out.loss, HELD_OUT_EXACT: held_out.exact_match}
        self._write(step, line, held_out)
        if is_last:
            self.num_steps = step
        self._clear()

    def _speed(self, costs: Balance, num_responses: float, seconds: float) -> dict[str, float]:
        """Returns FLOP/s of one rank, and their shares of the device's peak where it is known."""
        if self._flops is None or not seconds:
            return {}
        rank_seconds = seconds * self.ranks.world_size
        model = self._flops.of_model(costs.real, num_responses) / rank_seconds
        hardware = self._flops.of_hardware(costs.computed, num_responses) / rank_seconds
        line = {MODEL_FLOPS: model / 1e12, HARDWARE_FLOPS: hardware / 1e12}
        if self._peak_flops is not None:
            line |= {MFU: model / self._peak_flops, HFU: hardware / self._peak_flops}
        return line

    @contextmanager
    def counting(self, pause: str) -> Iterator[None]:
        """Counts the seconds inside, which are part of training. pause: one of `PAUSES`: waiting
        for batches, or Python's garbage collector."""
        started = self.meter.clock()
        yield
        self._pauses[pause] += self.meter.clock() - started

    @contextmanager
    def pause(self, activity: str = CHECKPOINT) -> Iterator[None]:
        """Counts the seconds inside for another activity than training. Synchronises with the
        device at both ends."""
        self._losses.cpu()
        with self.meter.during(activity):
            yield
            self._losses.cpu()

    def finish(self) -> None:
        """Closes files and the bar."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        with self._tensorboard_may_fail():
            if self._writer is not None:
                self._writer.close()
        if self._trackers is not None:
            self._say(self._trackers.finish())

    def facts(self) -> dict[str, float]:
        """Returns the facts of the whole stage, for the report."""
        speed = self._speed(
            self._balance, self.meter.tokens["response"], self.meter.seconds[TRAINING]
        )
        names = {
            MODEL_FLOPS: "model_tflops_per_second_per_rank",
            HARDWARE_FLOPS: "hardware_tflops_per_second_per_rank",
            MFU: "mfu",
            HFU: "hfu",
        }
        return {
            **{names[key]: value for key, value in speed.items()},
            "num_steps": self.num_steps,
            "num_skipped_steps": self.num_skipped,
            "useful_share": self._balance.useful_share(self.ranks.world_size),
            **({"energy_joules": self.joules} if np.isfinite(self.joules) else {}),
            **self.meter.facts(),
        }

    def _write(
        self, step: int, line: dict[str, float], held_out: HeldOutLoss | None = None
    ) -> None:
        if self._file is None:
            return
        # NaN is not valid JSON, and readers must be able to read the line that shows the problem.
        printable = {k: v if np.isfinite(v) else None for k, v in line.items()}
        with accessing(self._metrics):
            self._file.write(json.dumps(printable) + "\n")
            self._file.flush()
        with self._tensorboard_may_fail():
            if self._writer is not None:
                self._write_scalars(step, line)
        if self._trackers is not None:
            values = {tag: line[key] for key, (tag, _) in SCALARS.items() if key in line}
            self._say(self._trackers.log(values, step))
        losses = f"ntp {line[NTP]:.4f}" + (f" mixup {line[MIXUP]:.4f}" if self.has_mixup else "")
        rate = f"{line[REAL_RATE]:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, info=f"{losses} {rate}")
        else:
            optimiser = f"|g| {line[GRAD_NORM]:.3g} lr {line[LEARNING_RATE]:.2e}"
            print(f"{self.stage} {step}/{self.num_steps} {losses} {optimiser} {rate}", flush=True)
        if held_out is not None:
            self._show(held_out, step)

    def _show(self, held_out: HeldOutLoss, step: int) -> None:
        text = f"{self.stage} {step}/{self.num_steps} held out {held_out.loss:.4f}"
        text += f", exact match {held_out.exact_match:.1%}"
        text += " (the lowest loss so far)" if held_out.is_best else ""
        self._say([text])

    def _say(self, lines: list[str]) -> None:
        for text in lines:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)

    def _write_scalars(self, step: int, line: dict[str, float]) -> None:
        """Writes a point of each TensorBoard curve; `SummaryWriter.add_scalar` takes no
        description."""
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata

        values = []
        for key, (tag, description) in SCALARS.items():
            if key in line:
                metadata = SummaryMetadata(summary_description=description)
                metadata.plugin_data.plugin_name = "scalars"
                values.append(Summary.Value(tag=tag, simple_value=line[key], metadata=metadata))
        self._writer.file_writer.add_summary(Summary(value=values), step)

    @contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """Continues without TensorBoard if its files cannot be written, with a message;
        metrics.jsonl has the same figures."""
        try:
            yield
        except OSError as error:
            self._writer = None
            print(
                f"  TensorBoard is left out from here on: {describe(error, self._tensorboard)}",
                flush=True,
            )

    def _clear(self) -> None:
        self._losses = torch.zeros(3, dtype=torch.float64, device=self.ranks.device)
        self._window = dict.fromkeys(WINDOW, 0.0)
        self._pauses = dict.fromkeys(PAUSES, 0.0)


def memory_of(ranks: Ranks) -> dict[str, float]:
    """Returns the peak of the rank with the most memory, and on GPUs what torch holds and how often
    it freed its cache to find memory. Collective: all ranks must call it."""
    own = {PEAK_MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # KiB on Linux
    if ranks.device.type == "cuda":
        own = {
            PEAK_MEMORY: torch.cuda.max_memory_allocated(ranks.device) / 2**30,
            RESERVED_MEMORY: torch.cuda.memory_reserved(ranks.device) / 2**30,
            RETRIES: float(torch.cuda.memory_stats(ranks.device).get("num_alloc_retries", 0)),
        }
    rows = ranks.gather_rows(torch.tensor([list(own.values())], dtype=torch.float64))
    return {
        name: float(column.sum() if name == RETRIES else column.max())
        for name, column in zip(own, rows.T, strict=True)
    }


_other_hook = threading.excepthook


def _hook_of_threads(failed: threading.ExceptHookArgs) -> None:
    if not (
        isinstance(failed.exc_value, OSError)
        and type(failed.thread).__name__ == "_AsyncWriterThread"
    ):
        _other_hook(failed)


def _summary_writer(folder: Path, *, purge_step: int | None) -> Any:
    """Returns TensorBoard's writer. If a file cannot be written, its thread prints no traceback,
    and the next call raises the error."""
    from torch.utils.tensorboard import SummaryWriter

    global _other_hook
    if threading.excepthook is not _hook_of_threads:
        _other_hook, threading.excepthook = threading.excepthook, _hook_of_threads
    return SummaryWriter(str(folder), purge_step=purge_step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics file; a last line that was cut off by a kill is ignored."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
