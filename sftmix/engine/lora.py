"""Low-rank adapters (LoRA) beside frozen weights: their places, their initial values, and their
published files.

    W x  becomes  W x + alpha / rank * B A x        A (rank, in) drawn, B (out, rank) zero, W frozen

peft inserts the layers into the model (https://arxiv.org/abs/2106.09685,
https://github.com/huggingface/peft). The head and the embedding get no adapter, because the loss is
computed in the head's module (`loss/head.py`), and neither does a vision tower. The embedding
output needs no gradient: activation checkpointing is not reentrant here, and ZeRO-3 releases the
first layer's weights without one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.config.schema import LoraConfig, ModelConfig
from sftmix.engine.vision import vision_parameters
from sftmix.errors import ConfigError, did_you_mean

ADAPTER = "default"  # peft's name for the only adapter
CHECKSUM_ELEMENTS = 1 << 24  # compared at once


def import_peft() -> Any:
    """Returns the peft module. Raises ConfigError if it cannot be imported."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"`lora` needs the packages peft and accelerate, and there is an ImportError: {error}."
            " Run `pip install peft accelerate` (in a checkout: `pip install '.[lora]'`), or"
            " remove `lora` to train all weights."
        ) from None
    return peft


def target_names(model: Any, lora: LoraConfig, *, name: str) -> list[str]:
    """Returns the dotted names of the modules that get an adapter. model: a transformers model,
    possibly on the meta device.

    name: of the model in the config. Raises ConfigError for a target that is not a module, not
    linear, or the head or embedding.
    """
    from transformers.pytorch_utils import Conv1D

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    vision = {id(parameter) for parameter in vision_parameters(model)}
    modules = {
        key: module
        for key, module in model.named_modules()
        if key and id(getattr(module, "weight", None)) not in vision
    }
    linear = [
        key
        for key, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    kinds = sorted({key.rpartition(".")[2] for key in linear})
    where = f"{name}.lora.target_modules"
    if lora.target_modules == "all-linear":
        if not linear:
            raise ConfigError(
                f"{where} is all-linear, and a {type(model).__name__} has no linear modules but the"
                " head. Remove `lora`."
            )
        return linear
    chosen: set[str] = set()
    for target in lora.target_modules:
        matched = [key for key in modules if key == target or key.endswith("." + target)]
        if not matched:
            remedy = did_you_mean(target, kinds, "Name one of these.")
            raise ConfigError(
                f"{where}: no module of a {type(model).__name__} is called `{target}`; its linear"
                f" ones: {', '.join(kinds)}. {remedy}"
            )
        for key in matched:
            if modules[key] is head or modules[key] is embedding:
                part = "head" if modules[key] is head else "embedding"
                raise ConfigError(
                    f"{where}: `{target}` is the {part}, which stays frozen: the loss is computed"
                    " where the head's weight is. Remove it, or train all weights (no `lora`)."
                    f" Linear modules: {', '.join(kinds)}."
                )
            if key not in linear:
                raise ConfigError(
                    f"{where}: `{target}` names {key}, a {type(modules[key]).__name__}, and an"
                    f" adapter goes beside a linear module. Name some of {', '.join(kinds)}."
                )
        chosen.update(matched)
    return [key for key in linear if key in chosen]


def num_adapter_parameters(model: Any, lora: LoraConfig, *, name: str) -> int:
    """Returns the number of adapter parameters of a model, possibly on the meta device. Raises as
    `target_names`."""
    modules = dict(model.named_modules())
    return sum(
        lora.rank * sum(modules[key].weight.shape) for key in target_names(model, lora, name=name)
    )


def add_adapters(
    model: Any, config: ModelConfig, *, dtype: torch.dtype, seed: int, name: str
) -> None:
    """Freezes a model and inserts adapters, equal on every rank. Under ZeRO-3 the weights are
    already sharded; `deepspeed.initialize` shards the adapters. Raises ConfigError as
    `target_names` and `import_peft`."""
    lora = config.lora
    assert lora is not None, "the caller looks whether there are to be adapters"
    from transformers.pytorch_utils import Conv1D

    peft = import_peft()
    names = target_names(model, lora, name=name)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(key), Conv1D) for key in names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.path,
        revision=config.revision,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == is_adapter(key), f"{key}: only adapters are trained"
        # drawn in float32 and rounded: DeepSpeed requires one dtype, and keeps a float32 copy
        if is_adapter(key):
            parameter.data = parameter.data.to(dtype)


def is_adapter(name: str) -> bool:
    """Returns whether this parameter belongs to an adapter of peft."""
    return f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields (name, peft layer) of every module that has an adapter; none in a model without."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def adapter_weights(layer: Any) -> dict[str, nn.Parameter]:
    """Returns a layer's A (rank, in) and B (out, rank) by their names in peft's files."""
    return {
        f"lora_{part}.weight": getattr(layer, f"lora_{part}")[ADAPTER].weight for part in ("A", "B")
    }


def merged_weight(layer: Any) -> Tensor:
    """Returns W + alpha / rank * B A, computed in at least float32 and rounded to W's dtype. All
    three must be gathered."""
    weight = layer.base_layer.weight.data
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (parameter.data.to(wide) for parameter in adapter_weights(layer).values())
    change = layer.scaling[ADAPTER] * (b @ a)
    return (weight.to(wide) + (change.t() if layer.fan_in_fan_out else change)).to(weight.dtype)


def write_adapter(folder: Path, model: Any, state: dict[str, Tensor]) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which
    `peft.PeftModel.from_pretrained` reads.

    state: whole tensors by the name of their module in the model plus their own name,
    `model.layers.0.mlp.up_proj.lora_A.weight`.
    """
    from safetensors.torch import save_file

    settings = {**model.peft_config[ADAPTER].to_dict(), "inference_mode": True}
    settings = {
        key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def checksum(tensor: Tensor) -> int:
    """Returns a number that depends on every bit of a tensor and its position; computed on the
    tensor's device."""
    words = (
        tensor.detach()
        .reshape(-1)
        .view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )
    total = 0
    for part in words.split(CHECKSUM_ELEMENTS):
        places = torch.arange(1, part.numel() + 1, device=part.device)
        total = (31 * total + int((part.to(torch.int64) * places).sum())) % 2**63
    return total
