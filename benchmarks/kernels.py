"""The loss of SFTMix beside NTP alone, textbook SFTMix, and the bare matrix products, in one run.

    python benchmarks/kernels.py [--shapes 2048,512,32000 ...] [--rounds 10] [--out FILE.json]

Each round times every provider once, in rotating order, so that drift of clocks and load falls on all of them; the
figures are the median and the 20th and 80th percentile over the rounds, and ratios are medians of the ratios within
a round. Forward and backward together. Half of the rows are confident, all rows are paired. Weights are
N(0, 0.02); hidden states are drawn so that about 60% of the tokens have a probability above one half, since time and
power depend on the data.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from sftmix import artifacts
from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy

MU = 0.2


def draw(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns hidden (T, D), weight (V, D), labels, pairs and lam of one problem."""
    generator = torch.Generator(device).manual_seed(0)
    weight = 0.02 * torch.randn(vocab_size, hidden_size, generator=generator, device=device)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device=device)
    # Along the label's row, so far that most tokens are predicted well.
    strength = torch.rand(num_rows, 1, generator=generator, device=device) * 60 / (hidden_size * 0.02**2) * 0.5
    hidden = strength * weight[labels] + torch.randn(num_rows, hidden_size, generator=generator, device=device)
    lam = torch.distributions.Beta(0.5, 0.5).sample((num_rows // 2,)).to(device)
    pairs = torch.randperm(num_rows, generator=generator, device=device)[: 2 * (num_rows // 2)].view(-1, 2)
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": labels,
        "pairs": pairs,
        "lam": lam,
    }


def textbook(hidden, weight, labels, pairs, lam):  # type: ignore[no-untyped-def]
    """SFTMix as the paper writes it: mixed hidden states go through the head again."""
    ntp = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)
    share = lam[:, None]
    mixed = (share * hidden[pairs[:, 0]] + (1 - share) * hidden[pairs[:, 1]]).to(hidden.dtype)
    logits = (mixed @ weight.T).float()
    to_confident = torch.nn.functional.cross_entropy(logits, labels[pairs[:, 0]], reduction="none")
    to_unconfident = torch.nn.functional.cross_entropy(logits, labels[pairs[:, 1]], reduction="none")
    return ntp + MU * (lam * to_confident + (1 - lam) * to_unconfident).mean()


def providers(problem: dict[str, torch.Tensor], backend: str):  # type: ignore[no-untyped-def]
    """Returns name -> function of one forward and backward."""
    hidden, weight, labels, pairs, lam = problem.values()

    def bare_products() -> None:
        with torch.no_grad():
            logits = hidden @ weight.T
            logits @ weight
            logits.T @ hidden

    def ours(pairs, lam) -> None:  # type: ignore[no-untyped-def]
        fused_linear_mixup_cross_entropy(hidden, weight, labels, pairs, lam, MU, backend=backend).loss.backward()

    return {
        "sftmix (ours)": lambda: ours(pairs, lam),
        "ntp (ours)": lambda: ours(pairs[:0], lam[:0]),
        "sftmix (textbook)": lambda: textbook(hidden, weight, labels, pairs, lam).backward(),
        "ntp (torch cross_entropy)": lambda: torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels).backward(),
        "three bare products": bare_products,
    }


def seconds_of(function, problem, device) -> float:  # type: ignore[no-untyped-def]
    problem["hidden"].grad = problem["weight"].grad = None
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], *, rounds: int, backend: str, dtype: torch.dtype, device: torch.device) -> list[dict[str, object]]:
    """Returns a row per provider."""
    problem = draw(*shape, dtype, device)
    functions = providers(problem, backend)
    names = list(functions)
    for name in names:
        seconds_of(functions[name], problem, device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds_of(functions[name], problem, device))
    baseline = times["ntp (ours)"]
    rows: list[dict[str, object]] = []
    for name in names:
        p20, p50, p80 = (statistics.quantiles(times[name], n=10)[n] for n in (1, 4, 7))
        ratio = statistics.median(a / b for a, b in zip(times[name], baseline, strict=True))
        tflops = 6 * shape[0] * shape[1] * shape[2] / p50 / 1e12  # of the three products; recomputation is not rewarded
        rows.append({"provider": name, "ms": 1e3 * p50, "ms_20": 1e3 * p20, "ms_80": 1e3 * p80, "times_ntp_ours": ratio, "tflops": tflops})
        print(f"  {name:28s} {1e3 * p50:9.1f} ms [{1e3 * p20:.1f}, {1e3 * p80:.1f}]  {ratio:5.3f} x ntp (ours)", flush=True)
    return rows


def machine(device: torch.device) -> dict[str, object]:
    """Returns hardware and versions, for the record."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "versions": artifacts.versions(),
        "commit": artifacts.commit(),
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048,512,32000", "1024,256,128256"], metavar="T,D,V")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--backend", default="torch", choices=["torch", "triton"])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    report: dict[str, object] = {**machine(device), "dtype": str(dtype), "backend": options.backend, "rounds": options.rounds}
    results = {}
    for text in options.shapes:
        shape = tuple(int(n) for n in text.split(","))
        assert len(shape) == 3, f"--shapes wants T,D,V, found {text}"
        print(f"T, D, V = {text}, {dtype}, {device}", flush=True)
        results[text] = measure(shape, rounds=options.rounds, backend=options.backend, dtype=dtype, device=device)
    report["results"] = results
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(options.out, report)


if __name__ == "__main__":
    main()
