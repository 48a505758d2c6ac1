"""The formula of docs/recipes.md for the memory of a GPU. `python tests/support/memory.py` prints
the tables."""

import json
from pathlib import Path

ARCHITECTURES = Path(__file__).resolve().parents[2] / "configs/architectures"
GIB = 2**30
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)
FITS = 72  # GiB: what is left of an 80 GB GPU when a tenth is kept free
# configs/deepspeed/zero3.json
MAX_LIVE, PREFETCH, REDUCE_BUCKET = 1_000_000_000, 100_000_000, 200_000_000
DEFAULT_BUCKET = 500_000_000  # of DeepSpeed, where there is no JSON
LORA_GPUS = (2, 4, 8, 16)
LOGITS = 2**30  # kernels/chunked_linear_mixup.py: WORKSPACE_BYTES
START = 2 * GIB  # CUDA context and NCCL: a guess


def num_head_elements(a):
    return a["vocab_size"] * a["hidden_size"]


def states(num_parameters, num_gpus):
    """Bytes that stay from step to step: bf16 weights, float32 gradient sums, float32 weights and
    two moments."""
    return (2 + 4 + 4 + 4 + 4) * num_parameters / num_gpus


def working(a, *, tokens=8192):
    """Bytes that come and go within a micro-batch, whatever the number of GPUs."""
    hidden, layers = a["hidden_size"], a["num_hidden_layers"]
    head_dim = a.get("head_dim") or hidden // a["num_attention_heads"]
    width = (
        a["intermediate_size"]
        if "num_experts" not in a
        else a["num_experts_per_tok"] * a["moe_intermediate_size"]
    )
    gathered = 2 * (max(MAX_LIVE, num_head_elements(a)) + PREFETCH)
    gradients = 2 * 2 * REDUCE_BUCKET + (4 + 2) * num_head_elements(a)
    checkpoints = 2 * tokens * hidden * layers
    one_layer = (
        2
        * 2
        * tokens
        * (
            8 * hidden
            + 2 * (a["num_attention_heads"] + a["num_key_value_heads"]) * head_dim
            + 4 * width
        )
    )
    return gathered + gradients + checkpoints + one_layer + LOGITS + START


def lora_working(a, *, tokens=8192, is_sharded):
    """As `working`, of a run that trains adapters: the head has no gradient, and dropout keeps what
    it made of each module's input."""
    heads, hidden = a["num_attention_heads"], a["hidden_size"]
    head_dim = a.get("head_dim") or hidden // heads
    # experts have no adapters
    width = 0 if "num_experts" in a else 2 * hidden + a["intermediate_size"]
    dropped = 3 * tokens * (3 * hidden + heads * head_dim + width)  # bf16, and the mask
    rest = working(a, tokens=tokens) - (4 + 2) * num_head_elements(a) + dropped
    if is_sharded:
        return rest
    gathered = 2 * (max(MAX_LIVE, num_head_elements(a)) + PREFETCH)
    return rest - gathered - 2 * 2 * REDUCE_BUCKET + 2 * DEFAULT_BUCKET


def lora_row(name, num_parameters, num_adapters):
    a = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    whole = 2 * num_parameters + states(num_adapters, 1) + lora_working(a, is_sharded=False)
    totals = [
        whole,
        *(
            2 * num_parameters / n + states(num_adapters, n) + lora_working(a, is_sharded=True)
            for n in LORA_GPUS
        ),
    ]
    cells = [f"{total / GIB:.0f}" if total / GIB <= FITS else "-" for total in totals]
    return f"| {name} | {num_adapters:,} | {' | '.join(cells)} |"


def lora_table(published, adapters):
    """adapters: how many parameters those of each model have."""
    sizes = " | ".join(map(str, LORA_GPUS))
    lines = [
        f"| GPUs | adapters | ZeRO-1: any number | ZeRO-3: {sizes} |",
        "| --- |" + " ---: |" * (len(LORA_GPUS) + 2),
    ]
    return "\n".join(
        [*lines, *(lora_row(name, count, adapters[name]) for name, count in published.items())]
    )


def row(name, num_parameters):
    """Returns the model's line: GiB of a GPU under ZeRO-3, GiB of a GPU and of the node's memory
    with offload."""
    a = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    totals = [(states(num_parameters, n) + working(a)) / GIB for n in NUM_GPUS]
    cells = [f"{total:.0f}" if total <= FITS else "-" for total in totals]
    return (
        f"| {name} | {' | '.join(cells)} | {working(a) / GIB:.0f} |"
        f" {states(num_parameters, 1) / GIB:.0f} |"
    )


def table(published):
    sizes = " | ".join(map(str, NUM_GPUS))
    lines = [
        f"| GPUs | {sizes} | offload: GPU | offload: host |",
        "| --- |" + " ---: |" * (len(NUM_GPUS) + 2),
    ]
    return "\n".join([*lines, *(row(name, count) for name, count in published.items())])
