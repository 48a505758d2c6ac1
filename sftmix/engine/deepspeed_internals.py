"""DeepSpeed's private state: the one file that touches it. Unknown versions are refused.

Each function names the behaviour of DeepSpeed that makes it necessary.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from sftmix.engine.ranks import has_gpu
from sftmix.errors import ConfigError, TrainingError, did_you_mean

KNOWN = "0.19."  # versions whose private state is known; setup.py has the same bounds


def import_deepspeed():  # type: ignore[no-untyped-def]
    """Returns the deepspeed module, with its start-up messages reduced to warnings. Raises
    ConfigError for an unknown version."""
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    # DeepSpeed 0.19 uses names of collectives that torch 2.13 deprecates; a warning per call would
    # hide all other output.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        os.environ.setdefault("DS_LOG_LEVEL", "warning")
        import deepspeed
        from deepspeed.utils import logger

    if not deepspeed.__version__.startswith(KNOWN):
        raise ConfigError(
            f"DeepSpeed {deepspeed.__version__} is installed; sftmix knows the private state of"
            f" {KNOWN}x. Install one of these: pip install 'deepspeed=={KNOWN}*'."
        )
    logger.setLevel(logging.WARNING)
    return deepspeed


def release_leftovers(module: torch.nn.Module) -> None:
    """Releases what DeepSpeed 0.19 keeps of a destroyed engine until the process ends: two
    references to the model, which keep everything else alive (with ZeRO-3 this rank's share of the
    weights), and the process group of `zero_hpz_partition_size`, which DeepSpeed would refuse to
    create again for the next engine. Collective: all ranks must call it."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups

    # Parts of it too: layers that activation checkpointing runs again are entered and never left.
    parts = set(module.modules())
    FWD_MODULE_STACK[:] = [entered for entered in FWD_MODULE_STACK if entered not in parts]
    # private: its name is mangled
    cached = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for wrapped in inspect.getclosurevars(cached).nonlocals.values():
        if hasattr(wrapped, "cache_clear"):
            wrapped.cache_clear()  # its keys are modules
    group = groups._get_zero_param_intra_parallel_group()
    if group is not None:
        torch.distributed.destroy_process_group(group)
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


COLLECTIVES = frozenset(
    "all_gather all_gather_base all_gather_coalesced all_gather_into_tensor all_reduce"
    " all_reduce_coalesced all_to_all all_to_all_single broadcast inference_all_reduce reduce"
    " reduce_scatter reduce_scatter_tensor".split()
)


class TimedCommunication:
    """In the place of DeepSpeed's communication backend, from `start` to `stop`: `timer` is entered
    around every collective call and around the wait for its end. DeepSpeed's own meter
    (comms_logger) waits for the device after each call, and so measures a slower run."""

    def __init__(self, timer: Callable[[], contextlib.AbstractContextManager[None]]):
        from deepspeed.comm import comm

        _require(comm, "cdb")
        self._comm, self._plain, self._timer = comm, comm.cdb, timer

    def start(self) -> None:
        self._comm.cdb = self

    def stop(self) -> None:
        """Does nothing if it was not started, or another has its place."""
        if self._comm.cdb is self:
            self._comm.cdb = self._plain

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._plain, name)
        if name not in COLLECTIVES or not callable(found):
            return found

        def timed(*args: Any, **options: Any) -> Any:
            with self._timer():
                work = found(*args, **options)
            return _TimedWork(work, self._timer) if hasattr(work, "wait") else work

        return timed


class _TimedWork:
    """A collective call that has not ended."""

    def __init__(self, work: Any, timer: Callable[[], contextlib.AbstractContextManager[None]]):
        self._work, self._timer = work, timer

    def wait(self, *args: Any) -> Any:
        with self._timer():
            return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def build_no_extension() -> None:
    """Switches off the C++ extension for shared-memory reductions, which DeepSpeed would build on
    CPUs at the first start. gloo does the same without a compiler, without a lock file that a
    killed build leaves behind and later starts wait for, and without leftovers in /dev/shm."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def forget_groups() -> None:
    """Releases the process groups that DeepSpeed keeps in a module, because a reference to a group
    keeps its threads alive."""
    from deepspeed.utils import groups

    for name, value in list(vars(groups).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(groups, name, None)


def use_state_files(engine: Any, files: Any, *, writes_shared: bool = False) -> None:
    """Makes a DeepSpeed engine write and read its checkpoints through `files`, a
    `CheckpointEngine`. writes_shared: this rank also writes the files that DeepSpeed otherwise lets
    only rank 0 write (the weights, below ZeRO-3)."""
    _require(engine, "checkpoint_engine", "save_non_zero_checkpoint")
    engine.checkpoint_engine = files
    if writes_shared:
        engine.save_non_zero_checkpoint = True


@contextlib.contextmanager
def loading_universal(engine: Any, is_universal: bool) -> Iterator[None]:
    """Within the context, makes a DeepSpeed engine treat a checkpoint as universal, or as
    ordinary."""
    _require(engine._config, "load_universal_checkpoint")
    engine._config.load_universal_checkpoint = is_universal
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


@contextlib.contextmanager
def on_fetch(called: Callable[[], None]) -> Iterator[None]:
    """Within it, `called` is called whenever ZeRO-3 gathers the weights of a module, if they are
    there already too. These hooks are Python, and most of what ZeRO-3 costs a small model."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    _require(PartitionedParameterCoordinator, "fetch_sub_module")
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        called()
        return fetch(self, *args, **options)

    PartitionedParameterCoordinator.fetch_sub_module = counted
    try:
        yield
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = fetch


def _require(thing: Any, *names: str) -> None:
    """Raises RuntimeError if DeepSpeed has renamed an attribute: setting the old name would
    silently have no effect."""
    for name in names:
        if not hasattr(thing, name):
            raise RuntimeError(
                f"{type(thing).__name__} of DeepSpeed has no attribute {name}: it is another"
                f" version than {KNOWN}x"
            )


def check_zero_section(section: dict[str, Any], where: str) -> None:
    """Raises ConfigError for a key or value that DeepSpeed's own schema of `zero_optimization`
    refuses."""
    import_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        detail = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, detail["loc"])])
        if detail["type"] == "extra_forbidden":
            remedy = did_you_mean(
                str(detail["loc"][-1]), DeepSpeedZeroConfig.model_fields, "Remove it."
            )
            raise ConfigError(f"{where}: `{name}` is not a DeepSpeed key. {remedy}") from None
        raise ConfigError(
            f"{where}: `{name}` is {detail['input']!r}: {detail['msg'].lower()}. Correct the value."
        ) from None


def master_weights(optimizer: Any) -> list[torch.Tensor]:
    """Returns the tensors that the optimiser updates. Raises TrainingError for an unknown optimiser
    of DeepSpeed."""
    if isinstance(optimizer, torch.optim.Optimizer):
        return [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # bf16 without ZeRO
    ):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    raise TrainingError(
        f"{type(optimizer).__name__} keeps its master weights in no place that sftmix knows, so"
        " their precision cannot be checked. Install a version of deepspeed that setup.py allows.",
        on_all_ranks=True,
    )


def shard_of(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Returns this rank's part of a parameter under ZeRO-3; None elsewhere."""
    shard: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
    return shard


def whole_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Returns the shape of a parameter, which is empty itself where ZeRO-3 shards it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def purposes_of_tensors(module: torch.nn.Module, optimizer: Any) -> dict[str, list[torch.Tensor]]:
    """Returns the tensors that an engine keeps between steps, by what they are for.

    optimizer: DeepSpeed's or torch's. Tensors that DeepSpeed keeps elsewhere are missing.
    """
    weights = [shard if (shard := shard_of(p)) is not None else p for p in module.parameters()]
    found: dict[str, list[torch.Tensor]] = {"weights": weights + list(module.buffers())}
    # a parameter below the threshold is kept whole beside its shard
    found["persisted weights"] = [
        p.data for p in module.parameters() if shard_of(p) is not None and p.data.numel() > 1
    ]
    found["master weights"] = master_weights(optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    found["moments"] = [
        value
        for state in inner.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    found["gradients"] = [p.grad for p in module.parameters() if p.grad is not None]
    kept = [
        getattr(optimizer, name, None)
        for name in (
            "grad_partitions_flat_buffer",  # ZeRO-3
            "averaged_gradients",  # ZeRO-2
            "fp32_groups_gradients_flat",  # ZeRO-1 in bf16
        )
    ]
    found["gradients"] += [each for each in tree_leaves(kept) if isinstance(each, torch.Tensor)]
    buckets = getattr(optimizer, "ipg_buckets", {}).values()
    buffers = [getattr(bucket, "buffer", None) for bucket in buckets]  # below ZeRO-3 lists of two
    found["reduce buckets"] = [b for b in tree_leaves(buffers) if isinstance(b, torch.Tensor)]
    return found
