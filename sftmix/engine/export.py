"""Write an exported model as a Hugging Face folder, on rank 0; a failure is an error on all
ranks."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sftmix.config.schema import ModelConfig
from sftmix.data.encoding import end_of_turn
from sftmix.engine.loading import (
    layout_of,
    quiet_transformers,
    returning_freed_memory,
    saved_tensors,
)
from sftmix.engine.precision import SAFETENSORS
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.storage import faults
from sftmix.storage.failures import accessing, describe
from sftmix.storage.files import read_record, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# names of dtypes in safetensors files
NAMES = {dtype: name for name, dtype in SAFETENSORS.items()} | {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Tensors = Iterator[tuple[str, Tensor]]


@returning_freed_memory()
def write_on_main(
    ranks: Ranks, folder: Path, tensors: Tensors, write: Callable[[Tensors], None]
) -> None:
    """Lets rank 0 write a folder from `tensors`, which all ranks gather together. A failure is one
    error on all ranks, and no rank keeps waiting. An incomplete folder is removed."""
    error: BaseException | None = None
    passed = _Passed(tensors)
    if ranks.is_main:
        try:
            with accessing(folder):
                faults.point("export.write")
                write(passed)
        except (OSError, ArtifactError) as failure:
            error = failure
    for _ in passed:  # gathering needs all ranks, also after a failure of rank 0
        pass
    problem = ""
    if error is not None:
        if isinstance(error.__cause__, SafetensorError):  # the error names no file
            error.filename = str(folder / "*.safetensors")  # type: ignore[attr-defined]
        problem = (
            f"the model could not be exported: {describe(error, folder, needed_bytes=passed.bytes)}"
            if isinstance(error, OSError)
            else str(error)
        )
        shutil.rmtree(folder, ignore_errors=True)
    if ranks.agree([bool(problem)])[0]:
        raise ArtifactError(ranks.text_from_main(problem), on_all_ranks=True)


class _Passed(Tensors):
    """The same tensors. bytes: how many have passed."""

    def __init__(self, tensors: Tensors):
        self._tensors, self.bytes = tensors, 0

    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self._tensors)
        self.bytes += tensor.numel() * tensor.element_size()
        return name, tensor


class TensorFile:
    """A new safetensors file that is written one tensor at a time; the library takes all tensors of
    a file at once. tensors: what will be written, in any order; tensors on the meta device will do.

    Format (https://huggingface.co/docs/safetensors): 8 bytes with the length of the header, the
    header in JSON, the bytes of the tensors.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]):
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._missing: dict[str, int] = {}  # name -> where its bytes begin
        end = 0
        # wide types first: then all are aligned
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
            begin, end = end, end + math.prod(tensor.shape) * tensor.itemsize
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self._missing[name] = begin
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.path, self._start = path, 8 + len(text)
        self._expected = tensors
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a whole tensor, of any device. Raises ArtifactError for another shape or dtype
        than was announced."""
        expected = self._expected[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise ArtifactError(
                f"{self.path}: {name} is {NAMES[tensor.dtype]} {list(tensor.shape)}, and that of"
                f" the model is {NAMES[expected.dtype]} {list(expected.shape)}. The export is"
                " refused."
            )
        self._file.seek(self._start + self._missing.pop(name))
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(content.numpy().data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Closes the file. Raises ArtifactError if a tensor was not written."""
        self._file.close()
        if error is None and self._missing:
            raise ArtifactError(f"{self.path}: {sorted(self._missing)[:4]} were not written.")


def on_cpu(tensors: Tensors) -> dict[str, Tensor]:
    """Returns copies of all, which stay when they are no longer gathered."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors}


def write_model(
    folder: Path,
    shell: Any,
    tensors: Tensors,
    tokenizer: PreTrainedTokenizerBase,
    source: ModelConfig,
) -> None:
    """Writes a Hugging Face folder, each tensor as it arrives. shell: the model on the meta device,
    which defines names and files. What transformers converts on saving is held as a whole first.
    source: the model that was trained, whose generation config stays."""
    with quiet_transformers():
        layout = layout_of(shell, folder)
        if layout is None:
            shell.save_pretrained(folder, state_dict=on_cpu(tensors))
        else:
            _write_weights(folder, layout, dict(saved_tensors(shell)), tensors)
    write_json(
        folder / "generation_config.json",
        generation_settings(source, shell.config, tokenizer),
    )
    tokenizer.save_pretrained(folder)


def _write_weights(
    folder: Path, layout: dict[str, dict[str, str]], expected: dict[str, Tensor], tensors: Tensors
) -> None:
    places: dict[str, tuple[TensorFile, str]] = {}
    with contextlib.ExitStack() as opened:
        for path, names in layout.items():
            announced = {key: expected[name] for key, name in names.items()}
            file = opened.enter_context(TensorFile(folder / path, announced))
            places |= {name: (file, key) for key, name in names.items()}
        for name, tensor in tensors:
            if name in places:  # transformers leaves some buffers out
                file, key = places[name]
                file.write(key, tensor)


def generation_settings(
    source: ModelConfig, config: Any, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Returns the generation config of the source with its own settings, or an empty one, and the
    ids that end a response: those of the source, the tokenizer's and the config's end of sequence,
    and the token that the chat template writes after an assistant's text. config: of the model."""
    from transformers.utils.hub import cached_file

    settings: dict[str, Any] = {}
    if source.path is not None:
        file = cached_file(
            source.path,
            "generation_config.json",
            revision=source.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        settings = (file and read_record(Path(file))) or {}
    ends = [
        *_as_list(settings.get("eos_token_id")),
        tokenizer.eos_token_id,
        *_as_list(getattr(config, "eos_token_id", None)),
        end_of_turn(tokenizer),
    ]
    settings["eos_token_id"] = [number for number in dict.fromkeys(ends) if number is not None]
    settings.setdefault("pad_token_id", tokenizer.pad_token_id)
    return settings


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
