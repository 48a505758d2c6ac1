"""Floating-point operations of a training step, and the peak rate of the device.

Forward of a document of n tokens with r response tokens, for N parameters of the transformer
without embeddings and head, L layers, H query heads of size E, hidden size D, vocabulary V:

    2 N n  +  2 L H E n^2  +  2 V D r          (causal attention: half of a full square)

The backward costs twice as much, or as much where weights are frozen (LoRA). Mixup needs no product
of its own. Model FLOPs (MFU) count real tokens and no recomputation; hardware FLOPs (HFU) count
padding, and the transformer once more where activations are recomputed. Of a mixture of experts,
the experts that a token uses count.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch

# Dense FLOP/s in bf16 and fp16 with float32 sums, from NVIDIA's data sheets. The first name that is
# part of the device's counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class ModelFlops:
    """Of one forward. per_token: 2 N. per_square: 2 L H E. per_response: 2 V D. backward: cost of
    the backward over that of the forward. recomputes: activation checkpointing is on."""

    per_token: float
    per_square: float
    per_response: float
    backward: float
    recomputes: bool

    @property
    def square_share(self) -> float:
        """The cost of attention, over n^2 and in tokens: a document of n tokens costs as much as
        n + square_share n^2 tokens without attention."""
        return self.per_square / self.per_token

    def of_model(self, cost: float, num_responses: float) -> float:
        """Returns the FLOPs of a step. cost: sum of n + square_share n^2 over its documents."""
        return (1 + self.backward) * (self.per_token * cost + self.per_response * num_responses)

    def of_hardware(self, computed_cost: float, num_responses: float) -> float:
        """Returns the FLOPs that are computed. computed_cost: with padding."""
        again = self.per_token * computed_cost if self.recomputes else 0.0
        return self.of_model(computed_cost, num_responses) + again


def flops_of(
    model: Any,
    sizes: dict[int, tuple[int, ...]],
    *,
    is_frozen: bool,
    recomputes: bool,
    vision: Set[int] = frozenset(),
) -> ModelFlops:
    """Returns the FLOPs of a `CausalLMWithLoss`. sizes: whole shape of each parameter by its id,
    since ZeRO-3 leaves it empty. is_frozen: only adapters are trained. vision: ids of parameters of
    a vision tower, which is not counted."""
    config = model.model.config.get_text_config()
    head = sizes[id(model.projection.weight)]
    inputs = {id(p) for p in model.model.get_input_embeddings().parameters()}
    outside = inputs | vision | {id(p) for p in model.projection.parameters()}
    body = sum(_used(sizes[id(p)], config) for p in model.parameters() if id(p) not in outside)
    heads = getattr(config, "num_attention_heads", 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return ModelFlops(
        per_token=2.0 * max(1, body),
        per_square=2.0 * config.num_hidden_layers * heads * size,
        per_response=2.0 * head[0] * head[1],
        backward=1.0 if is_frozen else 2.0,
        recomputes=recomputes,
    )


def _used(shape: tuple[int, ...], config: Any) -> float:
    """Returns how many elements of a parameter take part in one token: of experts that are packed
    into one parameter (E, ..., ...), those that the router chooses."""
    count = float(torch.Size(shape).numel())
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    is_packed = experts is not None and len(shape) == 3 and shape[0] == experts
    return count * chosen / experts if is_packed and chosen else count


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the dense FLOP/s of a device in half precision; None where it is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)
