"""DeepSpeed's private state, touched here alone."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from typing import Any

import torch

from sftmix.engine.ranks import has_gpu
from sftmix.errors import ConfigError, did_you_mean


def import_deepspeed():  # type: ignore[no-untyped-def]
    """Returns the deepspeed module, with its start-up messages reduced to warnings."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found no GPU
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed; once per call would drown all else.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    return deepspeed


def release_leftovers(module: torch.nn.Module) -> None:
    """Lets go of what DeepSpeed 0.19 keeps of a destroyed engine to the end of the process: the model, by two names that hold all else with
    it (ZeRO-3: this rank's share of the weights), and the group of ranks that `zero_hpz_partition_size` made, because of which it
    would refuse to make it for the next engine. All ranks call it."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    FWD_MODULE_STACK[:] = [entered for entered in FWD_MODULE_STACK if entered is not module]
    cached = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
    for wrapped in inspect.getclosurevars(cached).nonlocals.values() if cached else ():
        if hasattr(wrapped, "cache_clear"):
            wrapped.cache_clear()  # its keys are modules
    group = groups._get_zero_param_intra_parallel_group()
    if group is not None:
        torch.distributed.destroy_process_group(group)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def check_zero_section(section: dict[str, Any], where: str) -> None:
    """Raises ConfigError for a key or value that DeepSpeed's own schema of `zero_optimization` refuses."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, detail["loc"])])
        if detail["type"] == "extra_forbidden":
            remedy = did_you_mean(str(detail["loc"][-1]), DeepSpeedZeroConfig.model_fields, "Remove it.")
            raise ConfigError(f"{where}: `{name}` is no key of DeepSpeed. {remedy}") from None
        raise ConfigError(f"{where}: `{name}` is {detail['input']!r}: {detail['msg'].lower()}. Correct the value.") from None
