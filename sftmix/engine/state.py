"""Save and load DeepSpeed's state of a training run. Every file is hashed while it is written, and
nothing is unpickled.

DeepSpeed's own `save_checkpoint` marks a checkpoint as "latest" before all ranks have written,
verifies nothing on loading, and unpickles files, which can execute code. Here it writes and reads
through `StateFiles`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import (
    CheckpointCommitInfo,
    CheckpointEngine,
)
from numpy.typing import NDArray

from sftmix.engine.deepspeed_internals import loading_universal, use_state_files
from sftmix.storage.checkpoints import HashedFile

FORCE_SAFE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class StateFiles(CheckpointEngine):  # type: ignore[misc]
    """Writes and reads DeepSpeed's state files. entries: those that this rank has written, for the
    manifest.

    A failed write does not raise, because other ranks would then wait for this one inside
    DeepSpeed. It is kept in `error`, and all ranks agree on it afterwards. in_background: files are
    copied to memory and written by a thread; call `wait`.
    """

    def __init__(self, *, in_background: bool = False, left_out: frozenset[str] = frozenset()):
        super().__init__()
        self.name = "sftmix"
        self.left_out = left_out
        self.entries: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None
        self._jobs: queue.Queue[tuple[Any, Path] | None] | None = (
            queue.Queue() if in_background else None
        )
        self._thread: threading.Thread | None = None
        if self._jobs is not None:
            self._thread = threading.Thread(target=self._write_all, daemon=True)
            self._thread.start()

    def create(self, info: CheckpointCommitInfo) -> None:
        """Does nothing."""

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file, now or in the background."""
        if self.left_out and isinstance(state_dict.get("module"), dict):
            # DeepSpeed removes frozen weights by their first name, and tied ones have a second
            # name.
            state_dict["module"] = {
                name: value
                for name, value in state_dict["module"].items()
                if name not in self.left_out
            }
        if self._jobs is None:
            self._write(state_dict, Path(path))
        else:
            self._jobs.put((_copied(state_dict), Path(path)))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Returns the content of a file whose digest was already verified. Call it inside
        `only_tensors` (which does not nest)."""
        return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Does nothing: sftmix publishes checkpoints itself."""
        return True

    @property
    def is_done(self) -> bool:
        """Returns whether everything is written."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> None:
        """Ends the saving."""
        if self._jobs is not None:
            self._jobs.put(None)

    def wait(self) -> None:
        """Waits until everything is written."""
        if self._thread is not None:
            self._thread.join()

    def save_arrays(self, folder: Path, arrays: dict[str, NDArray[np.float64]]) -> None:
        """Writes arrays beside the state."""
        for name, array in arrays.items():
            try:
                with contextlib.ExitStack() as closing:
                    file = HashedFile(folder / name)
                    closing.callback(file.abandon)
                    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)  # type: ignore[no-untyped-call]
                    self.entries[name] = file.close()
            except OSError as error:
                self.error = self.error or error

    def _write_all(self) -> None:
        assert self._jobs is not None
        while (job := self._jobs.get()) is not None:
            self._write(*job)

    def _write(self, state_dict: Any, path: Path) -> None:
        if self.error is not None:
            return
        file = None
        try:
            file = HashedFile(path)
            with _without_crc32():
                torch.save(state_dict, cast(IO[bytes], file))
            self.entries[path.name] = file.close()
        except (OSError, RuntimeError) as error:  # torch wraps the error of the file
            cause = file.error if file is not None and file.error is not None else error
            if not isinstance(cause, OSError):
                raise
            self.error = OSError(cause.errno, cause.strerror, str(path))
        finally:
            if file is not None:
                file.abandon()


def save_state(
    deepspeed_engine: Any, folder: Path, *, in_background: bool, writes_shared: bool = False
) -> StateFiles:
    """Writes the state of trained weights, optimiser and loss scaler into an existing folder.
    Collective: all ranks must call it.

    writes_shared: this rank also writes what DeepSpeed otherwise lets only rank 0 write (the
    weights, below ZeRO-3), because it has its own disk.
    """
    frozen = frozenset(
        name
        for name, p in deepspeed_engine.module.named_parameters(remove_duplicate=False)
        if not p.requires_grad
    )
    files = StateFiles(in_background=in_background, left_out=frozen)
    use_state_files(deepspeed_engine, files, writes_shared=writes_shared)
    deepspeed_engine.save_checkpoint(
        str(folder.parent),
        tag=folder.name,
        save_latest=False,
        exclude_frozen_parameters=bool(frozen),
    )
    files.finish()
    return files


def load_state(deepspeed_engine: Any, folder: Path, *, is_universal: bool) -> None:
    """Loads what `save_state` has written, or its universal form, into a new engine. Collective:
    all ranks must call it. The caller has verified the files."""
    use_state_files(deepspeed_engine, StateFiles())
    # ours, inside ZeRO's
    optimizer = getattr(deepspeed_engine.optimizer, "optimizer", deepspeed_engine.optimizer)
    groups = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    # otherwise frozen weights are missing
    is_whole = all(parameter.requires_grad for parameter in deepspeed_engine.module.parameters())
    with only_tensors(), loading_universal(deepspeed_engine, is_universal):
        path, _ = deepspeed_engine.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_module_strict=is_whole,
            load_lr_scheduler_states=False,
        )
    assert path is not None, (
        "DeepSpeed returns without loading where it finds no file; all were verified"
    )
    if is_universal:
        # DeepSpeed 0.19 gives all groups the weight decay of the first, and all parameters one
        # shared tensor as step count, which then grows by the number of parameters at every step.
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update(settings)
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def to_universal(folder: Path, target: Path) -> None:
    """Converts a checkpoint so that any number of ranks can load it. One process."""
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        only_tensors(),
    ):
        ds_to_universal.main(options)


@contextlib.contextmanager
def only_tensors() -> Iterator[None]:
    """Within the context, every `torch.load`, DeepSpeed's too, only unpickles tensors, plain
    values, and the plain records that DeepSpeed adds. None of these can execute code."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE_SAFE)
    os.environ[FORCE_SAFE] = "1"
    try:
        with torch.serialization.safe_globals(
            [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
        ):
            yield
    finally:
        if before is None:
            del os.environ[FORCE_SAFE]
        else:
            os.environ[FORCE_SAFE] = before


@contextlib.contextmanager
def _without_crc32() -> Iterator[None]:
    """Turns off torch's checksum of each tensor. It costs as much as writing, is never verified on
    loading, and is weaker than the SHA-256 of the file."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _copied(value: Any) -> Any:
    """Returns a state in which every tensor is a copy in the memory of the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return (
            type(value)((key, _copied(item)) for key, item in value.items())
            if value
            else type(value)()
        )
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
