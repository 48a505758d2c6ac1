"""The memory of a GPU for every model of the package: the tables of docs/recipes.md.

    python benchmarks/recipe_memory.py [--models llama3.1-8b ...] [--out FILE.json]

Plans of a micro-batch of 8,192 tokens (two examples of 4,096, half of them trained) in bf16 with
activation checkpointing, on GPUs of 80 GB: the step is traced on 8 GPUs and scaled to the others.
Computed, not measured. Models that the file has already are not traced again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import side_by_side
import torch

from sftmix.config.reader import load_config
from sftmix.config.schema import Config
from sftmix.config.shipped import CONFIGS
from sftmix.planning.figures import GIB
from sftmix.planning.hardware import gpu
from sftmix.planning.plan import FREE_SHARE, TRACED_TOKENS, memory_of
from sftmix.planning.step import Load, Step
from sftmix.planning.traces import trace_of

NUM_GPUS, LORA_GPUS = (1, 2, 4, 8, 16, 32, 64, 128), (2, 4, 8, 16)
TRACED = 8  # GPUs
LORA_MODELS = ("llama3.1-8b", "qwen2.5-14b", "qwen2.5-32b", "llama3.3-70b")
LOAD = Load(8192, 4096, 8192 * 4096)
MICRO_BATCHES = 2
LIMIT = FREE_SHARE * gpu("H100", interconnect=3200, gpus_per_node=8).memory
ADAPTERS = {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"}


def config_of(name: str, *, stage: int, offload: bool = False, lora: bool = False) -> Config:
    """Returns the config of a model of configs/architectures."""
    file = "zero3_offload" if offload else "zero3"
    architecture = (CONFIGS / f"architectures/{name}.json").read_text(encoding="utf-8")
    return load_config(
        "recipes/llama3.1-8b-alpaca",
        [
            "model.path=",
            "tokenizer.path=none",  # it is not read
            f"model.architecture={architecture}",
            f"model.lora={json.dumps(ADAPTERS) if lora else ''}",
            "engine.activation_checkpointing=true",
            f"engine.zero_stage={stage}",
            f"engine.deepspeed={f'deepspeed/{file}.json' if stage == 3 else ''}",
        ],
    )


def gib(config: Config, trace: Any, num_gpus: int) -> float:
    """Returns the GiB of a GPU."""
    step = Step(trace, num_gpus, config.engine.zero_stage)
    return memory_of(config, step, LOAD, MICRO_BATCHES, on_gpu=True).total / GIB


def row_of(name: str) -> dict[str, Any]:
    """Returns the GiB of a GPU by the number of GPUs, with offload, and with adapters."""
    config = config_of(name, stage=3)
    trace = trace_of(config, world_size=TRACED, max_tokens=TRACED_TOKENS)
    offload = config_of(name, stage=3, offload=True)
    moved = memory_of(offload, Step(trace, TRACED, 3), LOAD, MICRO_BATCHES, on_gpu=True)
    found: dict[str, Any] = {
        "model": name,
        "parameters": trace.num_parameters,
        "zero3": {n: gib(config, trace, n) for n in NUM_GPUS},
        "offload": [moved.total / GIB, TRACED * moved.offloaded / GIB],
    }
    if name not in LORA_MODELS:
        return found
    for stage, sizes in ((1, (1,)), (3, LORA_GPUS)):
        if stage == 1 and 2 * found["parameters"] > LIMIT:  # the weights alone
            found["lora_zero1"] = {1: 2 * found["parameters"] / GIB}
            continue
        config = config_of(name, stage=stage, lora=True)
        trace = trace_of(config, world_size=TRACED, max_tokens=TRACED_TOKENS)
        found[f"lora_zero{stage}"] = {n: gib(config, trace, n) for n in sizes}
    return {**found, "adapters": trace.num_trained_parameters}


def _cell(size: float) -> str:
    return f"{size:.0f}" if size * GIB <= LIMIT else "-"


def tables(content: dict[str, Any]) -> list[str]:
    """Returns both tables of docs/recipes.md."""
    first = [
        f"| GPUs | {' | '.join(map(str, NUM_GPUS))} | offload: GPU | offload: host |",
        "| --- |" + " ---: |" * (len(NUM_GPUS) + 2),
    ]
    second = [
        f"| GPUs | adapters | ZeRO-1: any number | ZeRO-3: {' | '.join(map(str, LORA_GPUS))} |",
        "| --- |" + " ---: |" * (len(LORA_GPUS) + 2),
    ]
    for row in content["rows"]:
        name = row["model"]
        cells = [*map(_cell, row["zero3"].values()), *(f"{size:.0f}" for size in row["offload"])]
        first.append(f"| {name} | {' | '.join(cells)} |")
        if name not in LORA_MODELS:
            continue
        cells = [*map(_cell, [*row["lora_zero1"].values(), *row["lora_zero3"].values()])]
        second.append(f"| {name} | {row['adapters']:,} | {' | '.join(cells)} |")
    return ["\n".join(first), "\n".join(second)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [path.stem for path in sorted(CONFIGS.glob("architectures/*.json"))]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if options.out is not None and options.out.is_file():
        rows = {row["model"]: row for row in json.loads(options.out.read_text())["rows"]}
    for name in options.models:
        if name not in rows:
            rows[name] = row_of(name)
            print(json.dumps(rows[name]), flush=True)
        if options.out is not None:
            machine = side_by_side.machine(torch.device("cpu"), "benchmarks/recipe_memory.py")
            ordered = [rows[name] for name in names if name in rows]
            options.out.write_text(json.dumps({**machine, "rows": ordered}, indent=1) + "\n")
    print("\n".join(tables({"rows": list(rows.values())})))


if __name__ == "__main__":
    main()
