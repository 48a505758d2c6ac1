"""The dtype that a run computes in, and the check that every tensor of an engine has it.

DeepSpeed and transformers promise the dtypes of their configs, and have broken that promise:
`deepspeed.zero.Init(dtype=torch.float32)` of DeepSpeed 0.19 builds bfloat16 weights where the
accelerator has no fp16 (DeepSpeed pull request 8428). Results depend on it, so the tensors
themselves are examined: after an engine is built, after its first step, after a state is loaded,
and in every exported file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sftmix.engine.deepspeed_internals import import_deepspeed, master_weights, shard_of
from sftmix.engine.ranks import Ranks, has_gpu
from sftmix.errors import ArtifactError, ConfigError, TrainingError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAFETENSORS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def resolve_precision(wanted: str) -> str:
    """Returns "bf16", "fp16" or "fp32" for a value of `engine.precision`; "auto" depends on this
    device."""
    if wanted == "auto":
        return "bf16" if has_gpu() and torch.cuda.is_bf16_supported() else "fp32"
    return wanted


def check_device_computes_in(precision: str) -> None:
    """Raises ConfigError if DeepSpeed's accelerator reports that it cannot compute in
    `precision`."""
    if precision == "fp32":
        return
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    supported = {
        "bf16": bool(device.is_bf16_supported()),
        "fp16": bool(device.is_fp16_supported()),  # None on a CPU without it
        "fp32": True,
    }
    if not supported[precision]:
        name = (
            torch.cuda.get_device_name() if has_gpu() else f"this machine's {device._name.upper()}"
        )
        others = " or ".join(other for other, is_there in supported.items() if is_there)
        raise ConfigError(
            f"engine.precision is {precision}, which {name} cannot compute in. Use {others}."
        )


@dataclass(frozen=True)
class ExpectedDtypes:
    """What a config asks for. weights: parameters, sharded or not. buffers: by name, as
    transformers builds them. master: the weights that the optimiser updates. states: its
    moments."""

    weights: torch.dtype
    buffers: Mapping[str, torch.dtype]
    master: torch.dtype
    states: torch.dtype

    @classmethod
    def of(
        cls, precision: str, settings: Mapping[str, Any], buffers: Mapping[str, torch.dtype]
    ) -> ExpectedDtypes:
        """settings: the complete DeepSpeed config, which may request half-precision master
        weights."""
        weights = DTYPES[precision]
        section = settings.get(precision, {})
        has_half_master = bool(section.get(f"{precision}_master_weights_and_grads"))
        has_half_states = bool(section.get(f"{precision}_optimizer_states"))
        master = weights if has_half_master else torch.float32
        return cls(weights, buffers, master, weights if has_half_states else torch.float32)


def check_dtypes(
    ranks: Ranks, module: nn.Module, optimizer: Any, expected: ExpectedDtypes, when: str
) -> None:
    """Raises TrainingError, on all ranks, that names the first tensor of any rank with another
    dtype than `expected`. optimizer: DeepSpeed's or torch's, None for an engine that only scores.
    Collective: all ranks must call it."""
    problem = ""
    for name, wanted, found in _dtypes(module, optimizer, expected):
        if wanted != found:
            problem = (
                f"{name} is {_short(found)} {when} (rank {ranks.rank}), and the config asks for"
                f" {_short(wanted)}. Nothing is trained in another precision than asked for: this"
                " is a fault of the installed deepspeed or transformers. `sftmix doctor` names"
                " versions that are known to be wrong; engine.zero_stage=1 may avoid it."
            )
            break
    problem = ranks.first_text(problem)
    if problem:
        raise TrainingError(problem, on_all_ranks=True)


def _dtypes(
    module: nn.Module, optimizer: Any, expected: ExpectedDtypes
) -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """Yields (name, expected dtype, found dtype) of every floating-point tensor of an engine."""
    for name, parameter in module.named_parameters():
        yield f"the weight {name}", expected.weights, parameter.dtype
        shard = shard_of(parameter)
        if shard is not None:
            yield f"this rank's part of the weight {name}", expected.weights, shard.dtype
    for name, buffer in module.named_buffers():
        yield f"the buffer {name}", expected.buffers[name], buffer.dtype
    if optimizer is None:
        return
    for number, tensor in enumerate(master_weights(optimizer)):
        yield f"group {number} of the optimiser's master weights", expected.master, tensor.dtype
    inner = getattr(optimizer, "optimizer", optimizer)
    for number, state in enumerate(inner.state.values()):
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                yield f"the optimiser state {key} of group {number}", expected.states, value.dtype


def precision_of(module: nn.Module) -> str:
    """Returns the name of the dtype of a model's weights; `check_dtypes` ensures that there is
    one."""
    return NAMES[next(module.parameters()).dtype]


def check_exported(folder: Path, weights: torch.dtype, buffers: Mapping[str, torch.dtype]) -> None:
    """Raises ArtifactError if a tensor of an exported folder, or the dtype in its config.json,
    differs from the trained model. Reads only the headers of the files."""
    import json

    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                found = file.get_slice(name).get_dtype()
                wanted = buffers.get(name, weights)
                if found in SAFETENSORS and SAFETENSORS[found] != wanted:
                    raise ArtifactError(
                        f"{path}: {name} was written as {found}, and the trained tensor is"
                        f" {_short(wanted)}. The export is refused."
                    )
    config = folder / "config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        named = content.get("dtype", content.get("torch_dtype"))
        if named is not None and named != _short(weights):
            raise ArtifactError(
                f"{config}: the dtype is {named}, and the trained weights are {_short(weights)}."
                " The export is refused."
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
