"""The loss of SFTMix beside NTP alone, the textbook form, the peers, and the bare matrix products,
in one run.

    python benchmarks/loss_kernels.py [--shapes 2048,512,32000 ...] [--rounds 10] [--memory] [--out
    FILE.json]

Each round times every provider once, in rotating order, so that drift of clocks and load falls on
all of them; the figures are the median and the 20th and 80th percentile over the rounds, and ratios
are medians of the ratios within a round. Forward and backward together, except for nll and the
products. All get the same packed rows, all of which have a label and a partner. Before anything is
timed, every sftmix loss is compared with the textbook's, and every ntp loss with `F.cross_entropy`.
Peak memory (`--memory`) is that of a fresh process per provider, less what the problem itself
takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss_providers import NotMeasured, Problem, draw, providers
from side_by_side import machine, peak_bytes_of, rounds, spread
from torch import Tensor

from sftmix.kernels.chunked_linear_mixup import balanced_chunks
from sftmix.storage.files import write_json

PEERS = ("liger-kernel", "quack-kernels", "cut-cross-entropy")
SHAPES = {
    "cuda": [
        "8192,4096,128256",
        "16384,5120,152064",
        "8192,3584,152064",
        "8192,4096,32000",
        "8192,2304,256000,30",
    ],
    "cpu": ["2048,512,32000", "1024,256,128256"],
}
# Ratio of two rows, and what it should be at most: on a GPU, elsewhere.
TARGETS: list[tuple[str, str, float, float | None]] = [
    ("sftmix (ours)", "ntp (ours)", 1.03, 1.05),
    ("sftmix (ours)", "best ntp of a peer", 1.00, None),
    ("sftmix (ours)", "products (three, bare)", 1.15, None),
    ("sftmix (ours)", "sftmix (textbook, compiled)", 0.70, None),
    ("nll (ours)", "product (one, bare)", 1.15, None),
    ("dft (ours)", "ntp (ours)", 1.05, 1.05),
    ("eaft (ours)", "ntp (ours)", 1.05, 1.05),
    ("label-smoothing (ours)", "ntp (ours)", 1.05, 1.05),
]


def parse(shape: str) -> tuple[int, int, int, float | None]:
    """Returns T, D, V and the soft-cap of `T,D,V` or `T,D,V,CAP`."""
    numbers = shape.split(",")
    assert len(numbers) in (3, 4), f"--shapes wants T,D,V or T,D,V,CAP, found {shape}"
    return (
        int(numbers[0]),
        int(numbers[1]),
        int(numbers[2]),
        float(numbers[3]) if len(numbers) == 4 else None,
    )


def take_step(function: Callable[[Problem], Tensor], problem: Problem) -> float | None:
    """Calls a provider, backward included. Returns the loss of a scalar one, still on its way where
    nothing reads it."""
    for leaf in problem.leaves:
        leaf.grad = None
    out = function(problem)
    if out.requires_grad:
        out.backward()
    return out.detach() if out.dim() == 0 else None  # type: ignore[return-value]


def runnable(
    functions: dict[str, Callable[[Problem], Tensor]], problem: Problem
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tries every provider once: returns the loss of those that ran, and why the others have
    none."""
    losses, reasons = {}, {}
    for name, function in functions.items():
        try:
            loss = take_step(function, problem)
        except NotMeasured as reason:
            reasons[name] = str(reason)
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except Exception as error:  # a peer's failure is its row, not the end of the run
            if name.endswith("(ours)"):
                raise
            reasons[name] = (
                f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            )
        else:
            losses[name] = None if loss is None else float(loss)
    return losses, reasons


def check_losses(losses: dict[str, float | None], dtype: torch.dtype) -> None:
    """Raises AssertionError where providers of the same name compute different things."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for kind, standard in (("sftmix", "sftmix (textbook)"), ("ntp", "ntp (F.cross_entropy)")):
        expected = losses.get(standard)
        for name, loss in losses.items():
            if name.startswith(kind + " ") and expected is not None and loss is not None:
                assert abs(loss - expected) <= tolerance * abs(expected), (
                    f"{name} gives {loss}, {standard} {expected}"
                )


def measure(
    shape: str,
    *,
    num_rounds: int,
    backend: str | None,
    dtype: torch.dtype,
    device: torch.device,
    only: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Returns a row per provider. only: their names begin with one of these words."""
    num_rows, hidden_size, vocab_size, _ = parse(shape)
    problem = draw(*parse(shape), dtype=dtype, device=device)
    functions = {
        name: function
        for name, function in providers(backend).items()
        if only is None or name.startswith(tuple(only))
    }
    losses, reasons = runnable(functions, problem)
    check_losses(losses, dtype)
    calls = {name: lambda _, f=functions[name]: take_step(f, problem) for name in losses}
    for _ in rounds(calls, num_rounds=2, device=device):
        pass  # warm
    times: dict[str, list[float]] = {name: [] for name in calls}
    for measured in rounds(calls, num_rounds=num_rounds, device=device):
        for name, (seconds, _) in measured.items():
            times[name].append(seconds)
    rows: list[dict[str, Any]] = []
    for name in functions:
        if name in reasons:
            rows.append({"provider": name, "not_measured": reasons[name]})
            print(f"  {name:36s} not measured: {reasons[name]}", flush=True)
            continue
        p20, p50, p80 = spread(times[name])
        row = {"provider": name, "ms": 1e3 * p50, "ms_20": 1e3 * p20, "ms_80": 1e3 * p80}
        row["times_ntp_ours"] = statistics.median(
            a / b for a, b in zip(times[name], times["ntp (ours)"], strict=True)
        )
        if not name.startswith(("nll", "product ")):
            # of the three products; recomputation is not rewarded
            row["tflops"] = 6 * num_rows * hidden_size * vocab_size / p50 / 1e12
        rows.append(row)
        print(
            f"  {name:36s} {row['ms']:9.1f} ms [{row['ms_20']:.1f}, {row['ms_80']:.1f}] "
            f" {row['times_ntp_ours']:5.3f} x ntp (ours)",
            flush=True,
        )
    rows += ratios(times, is_gpu=device.type == "cuda")
    return rows


def ratios(times: dict[str, list[float]], *, is_gpu: bool) -> list[dict[str, Any]]:
    """Returns a row per target: the median of the ratios within a round."""
    peers = [
        name
        for name in times
        if name.startswith("ntp ") and name not in ("ntp (ours)", "ntp (F.cross_entropy)")
    ]
    rows: list[dict[str, Any]] = []
    for name, standard, on_gpu, elsewhere in TARGETS:
        target = on_gpu if is_gpu else elsewhere
        is_best = standard == "best ntp of a peer" and peers
        other = min(peers, key=lambda peer: statistics.median(times[peer])) if is_best else standard
        if name not in times or other not in times:
            continue
        ratio = statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
        rows.append({"ratio": f"{name} / {other}", "value": ratio, "target": target})
        print(
            f"  {name} / {other}: {ratio:.3f}"
            + ("" if target is None else f" (target {target:.2f})"),
            flush=True,
        )
    return rows


def peak_bytes(
    shape: str, name: str, *, backend: str | None, dtype: torch.dtype, device: torch.device
) -> int:
    """Returns the bytes that one call of a provider adds at its peak to what the problem takes. For
    a fresh process."""
    problem = draw(*parse(shape), dtype=dtype, device=device)
    function = providers(backend)[name]
    if device.type == "cpu":  # a small call first: code and thread pools are no part of the figure
        take_step(function, draw(64, 64, 128, problem.softcap, dtype=dtype, device=device))
    return peak_bytes_of(lambda: take_step(function, problem), device)


def add_predictions(results: dict[str, list[dict[str, Any]]]) -> str:
    """Adds to every row the least milliseconds that an H100 can take, measured or not. Returns how
    they are predicted."""
    import predicted_kernels

    for shape, rows in results.items():
        for row in rows:
            if "provider" in row:
                row["predicted_ms"] = predicted_kernels.milliseconds(row["provider"], *parse(shape))
    return predicted_kernels.METHOD


def add_memory(
    rows: list[dict[str, Any]], shape: str, command: list[str], dtype: torch.dtype
) -> None:
    """Adds `peak_bytes` to the rows of the losses, each from a process of its own, and the formula
    it should keep to."""
    num_rows, hidden_size, vocab_size, _ = parse(shape)
    slab_rows = max(
        stop - start for start, stop in balanced_chunks(num_rows, vocab_size, dtype.itemsize)
    )
    accumulator = max(4, dtype.itemsize) * vocab_size * hidden_size
    formula = dtype.itemsize * (slab_rows * vocab_size + num_rows * hidden_size) + accumulator
    for row in rows:
        if "ms" not in row or row["provider"].startswith(("nll", "product")):
            continue
        done = subprocess.run(
            [*command, "--memory-of", row["provider"], "--shapes", shape],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            row["peak_bytes_not_measured"] = done.stderr.strip().splitlines()[-1][:200]
            continue
        row["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"  {row['provider']:36s} {row['peak_bytes'] / 2**30:7.3f} GiB at its peak", flush=True
        )
    rows.append({"ratio": "slab of logits + float32 d weight + d hidden", "formula_bytes": formula})
    print(f"  slab of logits + float32 d weight + d hidden: {formula / 2**30:.3f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"]
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="T,D,V[,CAP]",
        help="default: five of 7B to 14B models on a GPU, two small ones on a CPU",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="providers whose names begin with one of these"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--backend", choices=["torch", "triton"], help="of our loss; default: by device"
    )
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory, for the first shape"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    shapes = options.shapes or SHAPES[device.type]
    if options.memory_of:
        print(
            peak_bytes(
                shapes[0], options.memory_of, backend=options.backend, dtype=dtype, device=device
            )
        )
        return

    report: dict[str, Any] = {
        "dtype": str(dtype),
        "backend": options.backend or "default",
        "rounds": options.rounds,
    }
    if device.type == "cuda" and not torch.cuda.is_available():
        names = providers(options.backend)
        report["device"] = "not measured: no GPU"
        report["results"] = {
            shape: [{"provider": name, "not_measured": "no GPU"} for name in names]
            for shape in shapes
        }
        print("no GPU here: every row is not measured, and ours are predicted")
    else:
        report |= machine(device, "benchmarks/loss_kernels.py", packages=PEERS)
        report["results"] = {}
        for shape in shapes:
            print(f"T, D, V = {shape}, {dtype}, {device}", flush=True)
            report["results"][shape] = measure(
                shape,
                num_rounds=options.rounds,
                backend=options.backend,
                dtype=dtype,
                device=device,
                only=options.only,
            )
        if options.memory:
            command = [
                sys.executable,
                __file__,
                "--device",
                options.device,
                "--dtype",
                str(dtype).removeprefix("torch."),
            ]
            command += ["--backend", options.backend] if options.backend else []
            add_memory(report["results"][shapes[0]], shapes[0], command, dtype)
    if device.type == "cuda":
        report["predicted"] = add_predictions(report["results"])
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, report)


if __name__ == "__main__":
    main()
