"""The DeepSpeed config of a run: the user's DeepSpeed JSON, completed from the YAML.

DeepSpeed ignores unknown top-level keys silently (`zero_optimisation` runs stage 0), so they are
refused here. A value that contradicts the YAML is refused too; the error names both values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftmix.config.schema import Config
from sftmix.config.shipped import find_config
from sftmix.errors import ConfigError, did_you_mean

# https://www.deepspeed.ai/docs/config-json/, as of DeepSpeed 0.19
KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger
    communication_data_type compile csv_monitor data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type sequence_parallel_size steps_per_print tensor_parallel
    tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)

# Decided by the YAML. The JSON may omit them or say "auto".
OWNED_BY_SFTMIX = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "optimizer": "train.learning_rate, train.weight_decay, train.adam_betas",
    "scheduler": "train.schedule, train.warmup_ratio",
    "torch_autocast": "engine.precision",
    "managed_gradient_accumulation": "the batch plan",
    "gradient_allreduce_op": "the loss, which is a mean over the whole step",
}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file, or of one of the package (`deepspeed/zero3.json`).

    Raises ConfigError if it is missing, is not a JSON object, or has a duplicate or unknown
    top-level key."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path}: the key `{key}` is defined twice. Remove one.")
            seen[key] = value
        return seen

    try:
        content = json.loads(
            find_config(path).read_text(encoding="utf-8"), object_pairs_hook=no_duplicates
        )
    except OSError as error:
        raise ConfigError(
            f"engine.deepspeed: {path}: {error.strerror}. Give the path of a DeepSpeed JSON file."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}. Fix the file.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    for key in content:
        if key not in KNOWN_KEYS:
            remedy = did_you_mean(key, KNOWN_KEYS, "Remove it.")
            raise ConfigError(
                f"{path}: `{key}` is not a DeepSpeed key, which would ignore it silently. {remedy}"
            )
    return content


def zero_section(config: Config) -> dict[str, Any]:
    """Returns `zero_optimization` of a config's DeepSpeed JSON; nothing without one. Raises
    ConfigError as `read_deepspeed_json`."""
    path = config.engine.deepspeed
    section: dict[str, Any] = read_deepspeed_json(path).get("zero_optimization", {}) if path else {}
    return section


def offload_of(config: Config) -> dict[str, bool]:
    """Returns whether the DeepSpeed JSON moves `optimizer` states and `param`eters to the host."""
    zero = zero_section(config)
    return {
        name: zero.get(f"offload_{name}", {}).get("device", "none") != "none"
        for name in ("optimizer", "param")
    }


def deepspeed_config(
    config: Config, *, precision: str, world_size: int, max_grad_norm: float
) -> dict[str, Any]:
    """Returns the complete config for `deepspeed.initialize`.

    precision: "bf16", "fp16" or "fp32", already resolved. The batch sizes are nominal: the batch
    plan decides the number of micro-batches per step, and the engine scales the loss itself.
    """
    path = config.engine.deepspeed
    content = read_deepspeed_json(path) if path else {}
    where = str(path)

    for key, owner in OWNED_BY_SFTMIX.items():
        if content.pop(key, "auto") != "auto":
            raise ConfigError(
                f"{where}: `{key}` is set here, but the YAML decides it ({owner}). Remove it, or"
                ' write "auto".'
            )
    if "bfloat16" in content:
        raise ConfigError(
            f"{where}: `bfloat16` is an old name, which DeepSpeed ignores beside `bf16`. Rename it"
            " to `bf16`."
        )
    dtype = f"engine.precision ({precision})"
    for path_there, ours, ours_name in (
        ("zero_optimization.stage", config.engine.zero_stage, "engine.zero_stage"),
        ("gradient_clipping", max_grad_norm, "train.max_grad_norm"),
        ("bf16.enabled", precision == "bf16", dtype),
        ("fp16.enabled", precision == "fp16", dtype),
    ):
        name, _, key = path_there.rpartition(".")
        section = _section(content, name, where) if name else content
        theirs = section.get(key, "auto")
        if theirs != "auto" and (
            theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool)
        ):
            raise ConfigError(
                f"{where}: {path_there} is {theirs!r}, but {ours_name} is {ours!r}. Make them"
                ' equal, or write "auto" in the JSON.'
            )
        section[key] = ours

    # Gradients of the micro-batches are summed in float32 for any dtype of the weights.
    _section(content, "data_types", where).setdefault("grad_accum_dtype", "fp32")
    content.setdefault("steps_per_print", 2**62)  # sftmix shows the progress itself
    content["train_micro_batch_size_per_gpu"] = 1
    content["gradient_accumulation_steps"] = 1
    content["train_batch_size"] = world_size
    return content


def _section(content: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    section = content.setdefault(key, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: `{key}` is {section!r}; expected an object.")
    return section
