"""FLOPs against those that torch counts while it computes."""

import pytest
import torch
from families import FAMILIES
from naive import model_from
from torch.utils.flop_counter import FlopCounterMode

from sftmix.loss.flops import ModelFlops, flops_of
from sftmix.loss.head import CausalLMWithLoss


def flops(name, **options):
    model = model_from(FAMILIES[name][0], dtype=torch.float32)
    wrapped = CausalLMWithLoss(model)
    sizes = {id(p): tuple(p.shape) for p in wrapped.parameters()}
    defaults = {"is_frozen": False, "recomputes": False}
    return wrapped, flops_of(wrapped, sizes, **{**defaults, **options})


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "phi3", "gpt-neox"])
@pytest.mark.parametrize("length", [7, 40])
def test_a_forward_and_backward_have_the_flops_that_torch_counts(name, length):
    model, found = flops(name)
    ids = torch.randint(97, (1, length))
    with FlopCounterMode(display=False) as counter:
        logits = model(ids, torch.ones_like(ids), None)
        logits.sum().backward()
    # its attention computes the whole square, and its head all positions
    expected = 3 * (
        found.per_token * length + 2 * found.per_square * length**2 + found.per_response * length
    )
    norms = sum(p.numel() for p in model.parameters() if p.dim() < 2)  # are no products
    assert counter.get_total_flops() == pytest.approx(expected, abs=3 * 2 * norms * length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


def test_only_the_experts_that_a_token_uses_count():
    model, found = flops("mixtral-moe")
    packed = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    others = sum(p.numel() for p in model.model.model.layers.parameters()) - packed
    norm = sum(p.numel() for p in model.model.model.norm.parameters())
    assert packed and found.per_token == 2 * (packed * 2 / 4 + others + norm)


def test_recomputation_padding_and_frozen_weights():
    full = ModelFlops(10.0, 0.1, 5.0, backward=2.0, recomputes=False)
    assert full.square_share == 0.01
    assert full.of_model(100.0, 20.0) == full.of_hardware(100.0, 20.0) == 3 * (1000 + 100)
    again = ModelFlops(10.0, 0.1, 5.0, backward=2.0, recomputes=True)
    assert again.of_model(100.0, 20.0) == 3300
    assert again.of_hardware(120.0, 20.0) == 3 * (1200 + 100) + 1200
    _, frozen = flops("llama", is_frozen=True)
    assert frozen.of_model(1.0, 0.0) == 2 * frozen.per_token
