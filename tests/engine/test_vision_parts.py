"""What of a model belongs to vision: it is not trained, and gets no adapter."""

import pytest
import torch
from tokenizers_for_tests import character_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig
from vision_models import FAMILIES, SPECIALS, config_of

from sftmix.config.schema import LoraConfig, ModelConfig
from sftmix.engine.lora import target_names
from sftmix.engine.vision import auto_class, freeze_vision, reads_images
from sftmix.errors import ConfigError

TOWER = ("vision", "visual", "connector")


@pytest.fixture(params=FAMILIES)
def model(request):
    config = config_of(request.param, character_tokenizer(SPECIALS[request.param]))
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def test_the_tower_and_its_connector_are_frozen(model):
    freeze_vision(model)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != any(part in name for part in TOWER), name


def test_adapters_are_in_the_language_model_alone(model):
    names = target_names(model, LoraConfig(), name="model")
    assert len(names) == 2 * 7 and not any(part in name for name in names for part in TOWER)
    chosen = target_names(model, LoraConfig(target_modules=["q_proj"]), name="model")
    assert len(chosen) == 2
    with pytest.raises(ConfigError, match="no module of a .* is called `patch_embed"):
        target_names(model, LoraConfig(target_modules=["patch_embedding"]), name="model")


def test_the_class_that_loads_a_model_is_found_by_its_config(model):
    assert reads_images(model.config) and auto_class(model.config) is AutoModelForImageTextToText
    text = LlamaConfig()
    assert not reads_images(text) and auto_class(text) is AutoModelForCausalLM


def test_a_tower_is_trained_or_adapters_are():
    with pytest.raises(ValueError, match="remove it or `train_vision`"):
        ModelConfig(path="a", train_vision=True, lora=LoraConfig())
