"""Predicted against published tokens per second and GPU.

    python benchmarks/planner_published.py [--out FILE.json]

No row is tuned: the rates are those of `sftmix plan --gpu`, and one factor for all that were
compiled. One number is fitted to all rows, `SUSTAINED` of sftmix/planning/hardware.py; the error
without the row itself in the fit is given beside. Most rows are of other frameworks, some of a
model that stands in for the published one, and the settings that a source does not give are
assumed; each row says so. Selective checkpointing, which keeps every second product, counts as half
of full. Sharding within the node counts as a run on one node.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import side_by_side
import torch

from sftmix.config.reader import load_config
from sftmix.planning.hardware import SUSTAINED, Hardware, gpu
from sftmix.planning.plan import TRACED_TOKENS
from sftmix.planning.step import Load, Step, Work
from sftmix.planning.timing import Seconds, seconds_of
from sftmix.planning.traces import trace_of, traced_world, with_known_architecture

# Of compiled models, assumed once for all rows: bytes that fusion does not spare, and calls left.
FUSED_BYTES, FUSED_CALLS = 0.5, 0.3
TARGET = 0.25
A800_LINK = 200e9  # bytes/s per direction, of its data sheet; else an A100


@dataclass(frozen=True)
class Row:
    """published: tokens per second and GPU. assumed: what the source does not say."""

    source: str
    recipe: str
    gpu: str
    gpus: int
    per_node: int
    sequence: int
    batch: int
    published: float
    compiled: bool = False
    checkpointing: bool | str = False  # or "selective"
    stage: int = 3
    lora: bool = False
    micro_batches: int = 1
    network: float = 3200.0
    assumed: str = ""


TITAN = "torchtitan benchmarks/llama3_h100_202412"
KEMPNER = "KempnerForge benchmarks/mfu_scaling"
ROWS = (
    Row(
        f"{TITAN}, eager",
        "llama3.1-8b",
        "H100",
        8,
        8,
        8192,
        1,
        5762,
        checkpointing="selective",
    ),
    Row(
        f"{TITAN}, compiled",
        "llama3.1-8b",
        "H100",
        8,
        8,
        8192,
        1,
        6667,
        compiled=True,
        checkpointing="selective",
    ),
    Row(
        f"{TITAN}, eager",
        "llama3.1-8b",
        "H100",
        128,
        8,
        8192,
        1,
        5605,
        checkpointing="selective",
        assumed="network",
    ),
    Row(
        f"{TITAN}, compiled",
        "llama3.1-8b",
        "H100",
        128,
        8,
        8192,
        1,
        6514,
        compiled=True,
        checkpointing="selective",
        assumed="network",
    ),
    Row(
        "accelerate examples/torch_native_parallelism",
        "llama3.1-8b",
        "H100",
        8,
        8,
        8192,
        1,
        8000,
        compiled=True,
        assumed="no checkpointing",
    ),
    Row(
        KEMPNER,
        "llama3.1-8b",
        "H200",
        1,
        4,
        4096,
        2,
        10471,
        compiled=True,
        checkpointing=True,
        assumed="batch",
    ),
    Row(
        KEMPNER,
        "llama3.1-8b",
        "H200",
        4,
        4,
        4096,
        2,
        9746,
        compiled=True,
        checkpointing=True,
        assumed="batch",
    ),
    Row(
        KEMPNER,
        "qwen2.5-14b",
        "H200",
        8,
        4,
        4096,
        2,
        4426,
        checkpointing=True,
        assumed="stand-in for 14.84B; batch, network",
    ),
    Row(
        "fms-fsdp README, HSDP",
        "mistral-7b",
        "H100",
        8,
        8,
        4096,
        2,
        9600,
        compiled=True,
        network=800,
        assumed="stand-in for Llama-2-7B; batch",
    ),
    Row(
        "fms-fsdp README",
        "llama3.3-70b",
        "H100",
        96,
        8,
        4096,
        2,
        890,
        compiled=True,
        checkpointing=True,
        network=800,
        assumed="stand-in for Llama-2-70B; batch",
    ),
    Row(
        "fms-fsdp README, HSDP",
        "mistral-7b",
        "A100",
        8,
        8,
        4096,
        2,
        3760,
        compiled=True,
        network=400,
        assumed="stand-in for Llama-2-7B; network",
    ),
    Row(
        "fms-fsdp README",
        "llama3.3-70b",
        "A100",
        128,
        8,
        4096,
        6,
        380,
        compiled=True,
        checkpointing=True,
        network=400,
        assumed="stand-in for Llama-2-70B; network",
    ),
    Row(
        "torchtitan docs/performance, selective op",
        "llama3.1-8b",
        "A100",
        64,
        8,
        8192,
        1,
        2973,
        checkpointing="selective",
        network=400,
        assumed="network",
    ),
    Row(
        "torchtitan docs/performance",
        "llama3.3-70b",
        "A100",
        64,
        8,
        8192,
        1,
        331,
        checkpointing=True,
        network=400,
        assumed="network",
    ),
    Row(
        "ms-swift Megatron quick start, ZeRO-3",
        "qwen2.5-14b",
        "A800",
        8,
        8,
        8192,
        1,
        1551,
        checkpointing=True,
        micro_batches=2,
    ),
    Row(
        "ms-swift Megatron quick start, ZeRO-2",
        "qwen2.5-14b",
        "A800",
        8,
        8,
        8192,
        1,
        1588,
        checkpointing=True,
        micro_batches=2,
        stage=2,
    ),
    Row(
        "torchtitan#1690",
        "qwen2.5-32b",
        "H100",
        8,
        8,
        4096,
        1,
        1874,
        compiled=True,
        checkpointing=True,
        assumed="stand-in for Qwen3-32B; length, batch",
    ),
    Row(
        "NeMo AutoModel performance summary",
        "llama3.3-70b",
        "H100",
        64,
        8,
        8192,
        1,
        867,
        checkpointing=True,
        assumed="length, batch, checkpointing, network",
    ),
    Row(
        "DeepSpeed#8255, DeepCompile",
        "qwen3-14b",
        "H200",
        8,
        8,
        2048,
        4,
        4650,
        compiled=True,
        checkpointing=True,
        assumed="checkpointing",
    ),
    Row(
        "NeMo AutoModel performance summary, LoRA",
        "llama3.1-8b",
        "H100",
        1,
        8,
        4096,
        1,
        12473,
        lora=True,
        stage=1,
        assumed="length, batch, no checkpointing",
    ),
    Row(
        "NeMo AutoModel performance summary, LoRA",
        "llama3.3-70b",
        "H100",
        8,
        8,
        4096,
        1,
        1092,
        lora=True,
        assumed="length, batch, no checkpointing",
    ),
    Row(
        "NeMo AutoModel performance summary, LoRA",
        "qwen2.5-32b",
        "H100",
        8,
        8,
        4096,
        1,
        2250,
        lora=True,
        assumed="length, batch, no checkpointing",
    ),
)


def hardware_of(row: Row) -> Hardware:
    """Returns the GPU of a row, with the factors of what was compiled."""
    name = "A100" if row.gpu == "A800" else row.gpu
    found = gpu(name, interconnect=row.network, gpus_per_node=row.per_node)
    if row.gpu == "A800":
        found = replace(found, link=found.link * A800_LINK / 300e9)
    if row.compiled:
        found = replace(
            found,
            moved=found.moved / FUSED_BYTES,
            operation_seconds=found.operation_seconds * FUSED_CALLS,
            hook_seconds=found.hook_seconds * FUSED_CALLS,
        )
    return found


def works_of(row: Row) -> list[dict[str, Work]]:
    """Returns what a step does; of selective checkpointing without and with."""
    found = []
    is_selective = row.checkpointing == "selective"
    for checkpointing in (False, True) if is_selective else (row.checkpointing,):
        overrides = [
            f"engine.activation_checkpointing={str(checkpointing).lower()}",
            f"engine.zero_stage={row.stage}",
            *(["engine.deepspeed="] if row.stage < 3 else []),
            *(["model.lora={rank: 16}"] if row.lora else []),
        ]
        config = load_config(f"recipes/{row.recipe}-alpaca", overrides)
        config = config.model_copy(update={"model": with_known_architecture(config.model)})
        world = traced_world(config, row.gpus)
        trace = trace_of(config, world_size=world, max_tokens=TRACED_TOKENS)
        tokens = row.sequence * row.batch
        load = Load(tokens, tokens, tokens * row.sequence)
        found.append(Step(trace, row.gpus, row.stage).work(load, row.micro_batches))
    return found


def seconds_with(row: Row, works: list[dict[str, Work]], sustained: float) -> Seconds:
    """Returns the seconds of a step, the mean of its works. sustained: as in `Hardware`."""
    hardware = replace(hardware_of(row), sustained=sustained)
    each = [vars(seconds_of(work, hardware)).values() for work in works]
    return Seconds(*(statistics.mean(column) for column in zip(*each, strict=True)))


def ratio(row: Row, works: list[dict[str, Work]], sustained: float) -> float:
    """Returns predicted over published tokens per second."""
    tokens = row.sequence * row.batch * row.micro_batches
    return tokens / seconds_with(row, works, sustained).expected / row.published


def fitted(known: list[tuple[Row, list[dict[str, Work]]]]) -> float:
    """Returns the share of the rates at which the median row is predicted right."""

    def error(sustained: float) -> float:
        return abs(math.log(statistics.median(ratio(*each, sustained) for each in known)))

    return min((number / 100 for number in range(50, 121)), key=error)


def predict(row: Row, works: list[dict[str, Work]], others: float) -> dict[str, Any]:
    """Returns a row with its prediction. others: share fitted without this row."""
    seconds = seconds_with(row, works, SUSTAINED)
    total = row.sequence * row.batch * row.micro_batches
    return {
        **vars(row),
        "predicted": total / seconds.expected,
        "range": [total / seconds.slow, total / seconds.fast],
        "ratio": ratio(row, works, SUSTAINED),
        "ratio_without_itself": ratio(row, works, others),
        "computing": seconds.computing,
        "hosting": seconds.hosting,
        "sending": seconds.sending,
    }


def summary_of(ratios: list[float]) -> dict[str, float]:
    """Returns how many are within the target, and the median and the largest error."""
    errors = [abs(each - 1) for each in ratios]
    return {
        "target": TARGET,
        "within": sum(error <= TARGET for error in errors),
        "of": len(errors),
        "median": statistics.median(errors),
        "largest": max(errors),
    }


def table(content: dict[str, Any]) -> list[str]:
    """Returns the table of docs/planning.md."""
    lines = [
        "| source | model | GPUs | published | predicted | ratio | assumed |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in content["rows"]:
        gpus = f"{row['gpus']} x {row['gpu']}"
        lines.append(
            f"| {row['source']} | {row['recipe']} | {gpus} | {row['published']:,}"
            f" | {row['predicted']:,.0f} | {row['ratio']:.2f} | {row['assumed']} |"
        )
    return lines


def sentence(content: dict[str, Any]) -> str:
    """Returns the line that every plan prints."""
    found = content["summary"]
    return (
        f"  tokens/s of published GPU runs {found['within']} of {found['of']} within"
        f" {found['target']:.0%}, median {found['median']:.0%}, largest {found['largest']:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known = []
    for row in ROWS:
        known.append((row, works_of(row)))
        print(f"traced: {row.source}, {row.recipe}", flush=True)
    rows = []
    for row, works in known:
        found = predict(row, works, fitted([each for each in known if each[0] is not row]))
        rows.append(found)
        print(
            f"{row.source:<48} {row.recipe:<13} {row.gpus:>4} x {row.gpu:<5}"
            f" {row.published:>7,.0f} {found['predicted']:>7,.0f} {found['ratio']:.2f}"
            f" {found['ratio_without_itself']:.2f}"
        )
    summary = {
        "fitted": fitted(known),
        "used": SUSTAINED,
        **summary_of([row["ratio"] for row in rows]),
        "without_itself": summary_of([row["ratio_without_itself"] for row in rows]),
    }
    print(json.dumps(summary))
    if options.out is not None:
        machine = side_by_side.machine(torch.device("cpu"), "benchmarks/planner_published.py")
        options.out.write_text(json.dumps({**machine, "summary": summary, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
