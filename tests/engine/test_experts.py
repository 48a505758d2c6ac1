"""Which modules own experts, by structure."""

import pytest
from families import FAMILIES
from naive import model_from
from torch import nn

from sftmix.engine.loading import owners_of_experts


@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers_have_no_experts_as_modules(name):
    assert owners_of_experts(model_from(FAMILIES[name][0])) == []


def model(experts):
    layer = nn.Module()
    layer.block = nn.Module()
    layer.block.experts = experts
    whole = nn.Module()
    whole.layers = nn.ModuleList([layer, nn.Linear(2, 2)])
    return whole


@pytest.mark.parametrize(
    ("experts", "count"),
    [
        (nn.ModuleList(nn.Linear(4, 6) for _ in range(3)), 1),
        (nn.ModuleList([nn.Linear(4, 6)]), 0),
        (nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)]), 0),
        (nn.ModuleList([nn.SiLU(), nn.SiLU()]), 0),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 0),
    ],
)
def test_a_list_of_equal_modules_inside_a_layer_is_one_of_experts(experts, count):
    whole = model(experts)
    found = owners_of_experts(whole)
    assert found == ([whole.layers[0].block] if count else [])


def test_the_list_of_layers_is_not_one_of_experts():
    whole = nn.Module()
    whole.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    assert owners_of_experts(whole) == []
