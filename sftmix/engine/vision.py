"""Models that also read images: which class loads them, and what of them belongs to vision."""

from __future__ import annotations

from typing import Any

from torch import nn

from sftmix.errors import ConfigError


def reads_images(config: Any) -> bool:
    """Returns whether a model of this transformers config takes images."""
    from transformers import AutoModelForImageTextToText

    return type(config) in AutoModelForImageTextToText._model_mapping


def auto_class(config: Any) -> Any:
    """Returns the class of transformers that builds and loads a model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_text = type(config) in AutoModelForCausalLM._model_mapping or not reads_images(config)
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def is_known(config: Any) -> bool:
    """Returns whether transformers itself has a causal language model of this config."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping or reads_images(config)


def vision_parameters(model: Any) -> list[nn.Parameter]:
    """Returns the parameters of the vision tower and of what connects it to the language model;
    none of a model that reads text only."""
    if not reads_images(model.config):
        return []
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    text = {id(parameter) for part in parts for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in text]


def freeze_vision(model: Any) -> None:
    """Excludes the vision tower from training. Raises ConfigError where it cannot be told from the
    language model."""
    found = vision_parameters(model)
    if not found:
        raise ConfigError(
            f"the vision tower of a {type(model).__name__} cannot be told from its language model,"
            " so it cannot be frozen. Set model.train_vision=true to train it, too."
        )
    for parameter in found:
        parameter.requires_grad_(False)
