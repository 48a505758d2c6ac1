"""What a GPU and its network do: data sheets, and what is reached of them.

Shares marked as measured are of an H100; for other GPUs the same shares are assumed. A file of
`sftmix plan --calibrate` replaces all of it by what was measured on a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sftmix.errors import ConfigError, did_you_mean
from sftmix.loss.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Hardware:
    """One kind of machine.

    memory: bytes of a GPU. peak_flops: dense, in bf16, of the data sheet. product_flops,
    attention_flops: reached by a large product, and by attention. moved, updated: bytes/s read and
    written by other operations, and by the optimiser. operation_seconds: of a call into torch on
    the host. hook_seconds: of ZeRO-3, for each module that it looks at. product_seconds: added to
    each product. link, network: bytes/s of a GPU within a node, and of a node to others.
    call_seconds, node_seconds: of a collective call within a node, and per further node.
    sustained: share of the rates of products, attention and memory that whole runs reach.
    is_synchronous: nothing overlaps, as on a CPU. source: where the figures come from.
    """

    name: str
    memory: float
    peak_flops: float
    product_flops: float
    attention_flops: float
    moved: float
    updated: float
    operation_seconds: float
    hook_seconds: float
    product_seconds: float
    link: float
    network: float
    call_seconds: float
    node_seconds: float
    gpus_per_node: int
    sustained: float
    is_synchronous: bool
    source: str


# memory, memory bandwidth, link within the node per direction: bytes and bytes/s of NVIDIA's data
# sheets; without NVLink, PCIe 4.0 x16 (5.0 for H100 PCIe).
SHEETS: dict[str, tuple[float, float, float]] = {
    "H100": (80e9, 3.35e12, 450e9),
    "H100 PCIe": (80e9, 2.0e12, 64e9),
    "H100 NVL": (94e9, 3.9e12, 300e9),
    "H200": (141e9, 4.8e12, 450e9),
    "B200": (180e9, 8.0e12, 900e9),
    "A100": (80e9, 2.04e12, 300e9),
    "A100 40GB": (40e9, 1.555e12, 300e9),
    "L40S": (48e9, 0.864e12, 32e9),
    "RTX 4090": (24e9, 1.008e12, 32e9),
}
PRODUCT_SHARE = 0.807  # measured on an H100: 798 of 989 TFLOP/s, 8192^3 in bf16
MOVED_SHARE = 0.9  # measured on an H100: 3.0 of 3.35 TB/s, a copy
ATTENTION_SHARE = 0.45  # assumed: of FlashAttention-2, forward and backward
LINK_SHARE = 0.8  # assumed: of NCCL
# Fitted once to published runs, as the median of all rows (benchmarks/planner_published.py): clocks
# under load, smaller products, what is not counted.
SUSTAINED = 0.85
OPERATION_SECONDS = 5e-6  # assumed: of a call into torch
HOOK_SECONDS = 50e-6  # assumed: of DeepSpeed's Python around a module
PRODUCT_SECONDS = 5e-6  # assumed: start and end of a kernel
CALL_SECONDS, NODE_SECONDS = 20e-6, 6e-6  # assumed: of NCCL


def gpu(name: str, *, interconnect: float, gpus_per_node: int) -> Hardware:
    """Returns a GPU by its name. interconnect: Gb/s of a node. Raises ConfigError for one that is
    not known."""
    known = {key.lower(): key for key in SHEETS}
    key = known.get(name.lower().removeprefix("nvidia ").replace("-", " "))
    if key is None:
        remedy = did_you_mean(name, SHEETS, "")
        raise ConfigError(
            f"--gpu {name}: known are {', '.join(SHEETS)}, and files of `sftmix plan --calibrate`."
            f" {remedy}".strip()
        )
    memory, bandwidth, link = SHEETS[key]
    peak = next(flops for part, flops in PEAK_FLOPS.items() if key.startswith(part))
    return Hardware(
        name=key,
        memory=memory,
        peak_flops=peak,
        product_flops=PRODUCT_SHARE * peak,
        attention_flops=ATTENTION_SHARE * peak,
        moved=MOVED_SHARE * bandwidth,
        updated=MOVED_SHARE * bandwidth,
        operation_seconds=OPERATION_SECONDS,
        hook_seconds=HOOK_SECONDS,
        product_seconds=PRODUCT_SECONDS,
        link=LINK_SHARE * link,
        network=LINK_SHARE * interconnect * 1e9 / 8,
        call_seconds=CALL_SECONDS,
        node_seconds=NODE_SECONDS,
        gpus_per_node=gpus_per_node,
        sustained=SUSTAINED,
        is_synchronous=False,
        source="data sheets, shares measured on an H100 or assumed; not validated on this GPU",
    )


def find(name: str, *, interconnect: float, gpus_per_node: int) -> Hardware:
    """Returns a GPU by its name, or the machine of a file that `--calibrate` wrote. Raises
    ConfigError."""
    path = Path(name)
    if path.suffix != ".json":
        return gpu(name, interconnect=interconnect, gpus_per_node=gpus_per_node)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Hardware(**content["hardware"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--gpu {name}: not a file of `sftmix plan --calibrate`: {error}. Measure again."
        ) from None


def as_json(hardware: Hardware, facts: Mapping[str, Any]) -> str:
    """Returns the content of a file of `--calibrate`. facts: where and with what."""
    return json.dumps({"hardware": asdict(hardware), **facts}, indent=1, sort_keys=True) + "\n"
