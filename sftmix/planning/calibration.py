"""Measures the machine at hand: what small models' steps take, and from that the rates of
`hardware.py`.

Products are timed by themselves. Memory, network and the host are not: within a step they run at
other rates (caches, threads, hooks). Real steps of small models of different shapes are timed and
counted, and the rates are the non-negative least squares of their seconds, each relative to its
own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.cluster.environment import machine_bytes
from sftmix.cluster.local_ranks import first_failure, run_local_ranks
from sftmix.engine.counting import PHASES, Counted
from sftmix.errors import TrainingError
from sftmix.planning.hardware import Hardware
from sftmix.planning.step import flops_of
from sftmix.planning.timing import sent_share

LIMIT_SECONDS = 1800.0
VOCABULARY = 2000
# family, hidden size, layers, tokens of a micro-batch: products, attention, memory, calls and bytes
# sent must not grow together, and families differ in their operations. All activations have more
# than the 32,768 elements from which on torch computes with all threads: fewer cost less.
MODELS = (
    ("llama", 128, 3, 300),
    ("llama", 128, 5, 1000),
    ("llama", 256, 3, 800),
    ("llama", 384, 2, 400),
    ("llama", 128, 2, 2000),
    ("llama", 64, 8, 600),
    ("gemma2", 160, 3, 700),
    ("gpt2", 256, 2, 500),
)
# Each with ZeRO-3, with another stage in turn, and some as plans often have them.
OTHER_STAGES = (0, 1, 2)
LORA, CHECKPOINTING = {"lora": {"rank": 8}}, {"activation_checkpointing": True}
Settings = dict[str, Any]
VARIANTS: tuple[tuple[int, Settings, Settings], ...] = (  # number in MODELS, model, engine
    (0, {}, CHECKPOINTING),
    (2, LORA, {}),
    (3, LORA, {}),
    (5, {}, CHECKPOINTING),
    (6, LORA, {}),
    (7, {}, CHECKPOINTING),
)
SMALL_BUCKETS = {"reduce_bucket_size": 200_000, "stage3_prefetch_bucket_size": 200_000}
NO_RATE = 1e-15  # seconds per unit of what took no time that could be told apart


def small_config(
    family: str, hidden_size: int, layers: int, *, stage: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Returns the config of a small model. family: a model type of transformers."""
    heads = max(2, hidden_size // 64)
    architecture = {
        "model_type": family,
        "vocab_size": VOCABULARY,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "max_position_embeddings": 8192,
    }
    if family == "gpt2":
        architecture = {
            "model_type": family,
            "vocab_size": VOCABULARY,
            "n_embd": hidden_size,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 8192,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        }
    elif family == "gemma2":
        architecture |= {"head_dim": hidden_size // heads}
    return {
        "run": {"dir": "none"},
        "model": {"architecture": architecture},
        "tokenizer": {"path": "none"},
        "data": {"path": "none"},
        "engine": {"zero_stage": stage, "precision": precision},
    }


def measured_steps(
    requests: Sequence[Mapping[str, Any]], *, num_ranks: int, threads: int
) -> list[dict[str, Any]]:
    """Returns what `measure_worker` found for each request, on so many ranks of this machine.
    Raises TrainingError if a rank fails."""
    with tempfile.TemporaryDirectory(prefix="sftmix-plan-") as folder:
        given, result = Path(folder) / "requests.json", Path(folder) / "result.json"
        given.write_text(json.dumps(list(requests)), encoding="utf-8")
        command = [sys.executable, "-m", "sftmix.planning.measure_worker", str(given), str(result)]
        ends = run_local_ranks(
            command,
            num_ranks,
            limit_seconds=LIMIT_SECONDS,
            environment={
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": str(threads),
            },
        )
        failure = first_failure(ends)
        if failure is not None:
            lines = [line.strip() for line in failure.splitlines() if line.strip()]
            reason = " | ".join(lines[-3:])[-500:]
            raise TrainingError(f"a step could not be measured: {reason} Run `sftmix doctor`.")
        found: list[dict[str, Any]] = json.loads(result.read_text(encoding="utf-8"))
        return found


def requests_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the small steps behind the rates. folder: for a file that they read."""
    file = folder / "small_buckets.json"
    settings = {"zero_optimization": {"stage": 3, **SMALL_BUCKETS}}
    file.write_text(json.dumps(settings), encoding="utf-8")
    numbers = range(len(MODELS))
    steps: list[tuple[int, int, Settings, Settings]]
    steps = [(number, 3, {}, {}) for number in numbers]
    steps += [(number, OTHER_STAGES[number % len(OTHER_STAGES)], {}, {}) for number in numbers]
    steps += [(number, 3, model, engine) for number, model, engine in VARIANTS]
    found = []
    for number, stage, model, engine in steps:
        family, hidden, layers, tokens = MODELS[number]
        config = small_config(family, hidden, layers, stage=stage)
        config["model"] |= model
        config["engine"] |= engine
        if stage == 3 and number % 2:  # so that calls and models do not grow together
            config["engine"]["deepspeed"] = str(file)
        found.append({"config": config, "max_tokens": tokens})
    return found


def threads_of(num_ranks: int) -> int:
    """Returns the threads of each of so many ranks on this machine."""
    return max(1, (os.cpu_count() or 1) // num_ranks)


def calibrate(*, num_ranks: int) -> tuple[Hardware, dict[str, Any]]:
    """Returns this machine's rates for `num_ranks` ranks on its CPU, and the steps behind them."""
    with tempfile.TemporaryDirectory() as folder:
        requests = requests_of(Path(folder))
        steps = measured_steps(requests, num_ranks=num_ranks, threads=threads_of(num_ranks))
    return fit(steps, num_ranks=num_ranks), {"steps": [_short(step) for step in steps]}


def _short(step: Mapping[str, Any]) -> dict[str, Any]:
    names = ("world_size", "tokens", "num_parameters", "seconds", "threads")
    return {name: step[name] for name in names}


def amounts(counted: Counted) -> NDArray[np.float64]:
    """Returns what a step does in the units of the rates: FLOPs of products and of attention, bytes
    moved in the forward and backward, and by the optimiser, operations, ZeRO-3's hooks, bytes sent,
    calls."""
    products = counted.products.items()
    attention = sum(flops_of(p) * n for p, n in products if p.kind == "attention")
    moved = dict.fromkeys(PHASES, 0.0)
    for part, size in counted.moved.items():
        if part.phase in moved:
            moved[part.phase] += size
    sent = sum(sent_share(kind) * size for kind, size in counted.sent.items())
    updated = moved.pop("optimiser")
    return np.array(
        [
            sum(flops_of(p) * n for p, n in products) - attention,
            attention,
            sum(moved.values()),
            updated,
            sum(count for phase, count in counted.operations.items() if phase in PHASES),
            sum(count for phase, count in counted.hooks.items() if phase in PHASES),
            sent,
            sum(counted.calls.values()),
        ],
        dtype=np.float64,
    )


def fit(steps: Sequence[Mapping[str, Any]], *, num_ranks: int) -> Hardware:
    """Returns the rates that explain these steps best."""
    from scipy.optimize import nnls

    rows, seconds = [], []
    for step in steps:
        for name in ("one", "two"):
            rows.append(amounts(Counted.from_json(step[name])))
            seconds.append(statistics.median(step["seconds"][name]))
    table, target = np.array(rows), np.array(seconds)
    product = 1 / statistics.median(rate for step in steps for rate in step["product_flops"])
    others, left = table[:, 1:], 1 - table[:, 0] * product / target
    scale = np.maximum(others.max(axis=0), 1.0)
    found = nnls(others / scale / target[:, None], left)[0] / scale
    rates = np.concatenate([[product], np.maximum(found, NO_RATE)])
    # Where seconds scatter, the least squares of relative errors are too low: by 6% for a scatter
    # of 20%. So that half of the steps take longer than predicted, and half less:
    rates *= np.median(target / (table @ rates))
    product, attention, moved, updated, operation, hook, sent, call = map(float, rates)
    memory = float(machine_bytes()[0])
    return Hardware(
        name=f"{num_ranks} ranks of this machine's CPU",
        memory=memory / num_ranks,
        peak_flops=1 / product,
        product_flops=1 / product,
        attention_flops=1 / attention,
        moved=1 / moved,
        updated=1 / updated,
        operation_seconds=operation,
        hook_seconds=hook,
        product_seconds=0.0,
        link=1 / sent,
        network=1 / sent,
        call_seconds=call,
        node_seconds=0.0,
        gpus_per_node=num_ranks,
        sustained=1.0,
        is_synchronous=True,
        source=f"measured: {len(steps)} small models, {len(target)} steps",
    )
