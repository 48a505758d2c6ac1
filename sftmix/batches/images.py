"""Images of examples: the file that holds them, and what a model takes in their place.

In token ids an image is a run of placeholders, as many as the vision tower gives features for it.
transformers' processor of the model says how many, and makes the tensors that the tower reads. Its
part for videos is left out, because it needs torchvision. Images are resized by Pillow on every
machine, since torchvision's result differs from it.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from sftmix.errors import ConfigError, first_line
from sftmix.storage.files import read_record

FILE = "images.arrow"  # in the folder of the data stage
SCHEMA = pa.schema([("digest", pa.string()), ("content", pa.large_binary())])
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
# What a processor gives beside the tensors of its images.
OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
TYPE_IDS = "mm_token_type_ids"  # 1 for every placeholder, for models with positions in an image
GREY = (64, 64)  # width and height of the image in a micro-batch that has none


@dataclass(frozen=True)
class ImageInputs:
    """What a micro-batch needs of its images. tensors: arguments of the model's forward. token_id:
    of the placeholders. has_type_ids: the model also takes TYPE_IDS. filler: (S,) int32, ids of a
    further row without loss, where no example has an image: every micro-batch of every rank runs
    the vision tower, because ZeRO-3 gathers its weights on all ranks together."""

    tensors: dict[str, Tensor]
    token_id: int
    has_type_ids: bool
    filler: NDArray[np.int32] | None = None

    def of_batch(self, ids: Tensor) -> dict[str, Tensor]:
        """Returns the arguments of the model's forward. ids: (B, S) int64 of the micro-batch."""
        if not self.has_type_ids:
            return self.tensors
        return {**self.tensors, TYPE_IDS: (ids == self.token_id).int()}


class ImageProcessor:
    """transformers' processor of a folder. Raises ConfigError for one that cannot be loaded, or
    without a placeholder token."""

    def __init__(self, folder: str | Path, tokenizer: Any):
        self._processor = _load(str(folder), tokenizer)
        token = getattr(self._processor, "image_token", None)
        number = tokenizer.convert_tokens_to_ids(token) if token else None
        if number is None or number == tokenizer.unk_token_id:
            raise ConfigError(
                f"tokenizer: the processor in {folder} ({type(self._processor).__name__}) has no"
                " placeholder of images that its tokenizer knows, so this model's images cannot be"
                " read. Train it on text only, or name another model."
            )
        self.token, self.token_id = str(token), int(number)
        self.has_type_ids = TYPE_IDS in self._processor.model_input_names
        # of what decides how many tokens an image has, and which pixels the tower sees
        files = [_record(str(folder), name) for name in PROCESSOR_FILES[:2]]
        self.digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    def tokens(self, image: bytes) -> NDArray[np.int32]:
        """Returns the (S,) int32 ids that stand for an image."""
        found = self._call([image], add_special_tokens=False)
        return np.array(found["input_ids"][0], dtype=np.int32)

    def tensors(self, images: list[bytes]) -> dict[str, Tensor]:
        """Returns the tensors of images by the names of the model's arguments."""
        found = self._call(images, return_tensors="pt", padding=True)
        return {name: found[name] for name in found if name not in OF_TEXT}

    def _call(self, images: list[bytes], **options: Any) -> Any:
        """Every image is an example of its own: models take them in their order, whichever example
        they belong to."""
        opened = [[open_image(image)] for image in images]
        return self._processor(text=[self.token] * len(images), images=opened, **options)


class StoredImages:
    """The images of a data stage, memory-mapped: `FILE` of its folder."""

    def __init__(self, folder: Path):
        import datasets

        self._table = datasets.Dataset.from_file(str(folder / FILE), in_memory=False)

    def __getitem__(self, number: int) -> bytes:
        return self._table[int(number)]["content"]  # type: ignore[no-any-return]


class ExampleImages:
    """The images of tokenised examples. numbers: (N,) lists of numbers in the file of images."""

    def __init__(self, folder: Path, numbers: pa.ChunkedArray):
        from transformers import AutoTokenizer

        self._numbers = numbers
        self._stored = StoredImages(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
        self._processor = ImageProcessor(folder / "tokenizer", tokenizer)

    def of(self, indices: Sequence[int]) -> ImageInputs:
        """Returns what a micro-batch of these examples needs, in their order."""
        images = [self._stored[n] for i in indices for n in self._numbers[int(i)].as_py()]
        filler = None if images else self._filler
        return ImageInputs(
            self._processor.tensors(images or [self._grey]),
            self._processor.token_id,
            self._processor.has_type_ids,
            filler,
        )

    @cached_property
    def _filler(self) -> NDArray[np.int32]:
        return self._processor.tokens(self._grey)

    @cached_property
    def _grey(self) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", GREY, (128, 128, 128)).save(file, "PNG")
        return file.getvalue()


def open_image(content: bytes) -> Any:
    """Returns a Pillow image in RGB, turned as its camera was held. Raises OSError, ValueError or
    SyntaxError for what is no image."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(content)) as file:
        return ImageOps.exif_transpose(file).convert("RGB")


def has_processor(source: str | Path) -> bool:
    """Returns whether a folder or Hub name has a processor of images."""
    return any(_file_of(str(source), name) for name in PROCESSOR_FILES[:2])


def copy_processor(source: str | Path, folder: Path) -> None:
    """Copies the files of a processor, if there are any, beside a tokenizer or a model."""
    for name in PROCESSOR_FILES:
        file = _file_of(str(source), name)
        if file is not None:
            (folder / name).write_bytes(file.read_bytes())


def _file_of(source: str, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        return Path(source, name) if Path(source, name).is_file() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _load(folder: str, tokenizer: Any) -> Any:
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import processor_class_from_name

    contents = [_record(folder, name) for name in (*PROCESSOR_FILES[:2], "tokenizer_config.json")]
    names = [content["processor_class"] for content in contents if content.get("processor_class")]
    try:
        whole: Any = processor_class_from_name(names[0]) if names else None
        if whole is None:
            raise ConfigError(
                f"tokenizer: {folder} names no processor of transformers (`processor_class` in"
                f" {PROCESSOR_FILES[1]}), found {names[:1] or 'none'}. Complete the folder, or"
                " train on text only."
            )
        parts = [part for part in whole.get_attributes() if part != "video_processor"]
        kind = type(whole.__name__, (whole,), {"get_attributes": classmethod(lambda _: parts)})
        taken = inspect.signature(whole.__init__).parameters
        settings = {key: value for key, value in contents[1].items() if key in taken}
        if "video_processor" in taken:
            settings["video_processor"] = None
        settings["image_processor"] = AutoImageProcessor.from_pretrained(folder, backend="pil")
        settings["tokenizer"] = tokenizer
        return kind(**settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"tokenizer: the processor of images in {folder} cannot be loaded: {first_line(error)}"
            " Install what is missing (`pip install 'sftmix[vision]'`), or complete the folder."
        ) from error


def _record(source: str, name: str) -> dict[str, Any]:
    file = _file_of(source, name)
    return (read_record(file) if file is not None else None) or {}
