"""Images of rows: where a file has them, and the one file that the data stage keeps them in.

In the content of a message an image is the character `IMAGE`; the message's `images` names the
digests of its images, in order.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftmix.batches.images import FILE, SCHEMA, ImageProcessor
from sftmix.data.conversations import IMAGE, BadRow, Message
from sftmix.errors import counted, first_line
from sftmix.storage.failures import accessing

PLACE = "<image>"  # in texts of LLaVA's and LLaMA-Factory's files, beside a column of images
READERS = ("user", "system", "tool")  # roles whose messages may have images
# keys under which a part or a column holds one image
KEYS = ("bytes", "image", "path", "url", "image_url", "base64")


class ImageStore:
    """Writes the images of the rows to `FILE` in a folder, each once. processor: of the model that
    is to read them. Use as a context."""

    def __init__(self, folder: Path, processor: ImageProcessor):
        self.path, self.processor = folder / FILE, processor
        self.numbers: dict[str, int] = {}  # digest -> row of the file
        self._tokens: dict[str, NDArray[np.int32]] = {}
        self._distinct: dict[bytes, NDArray[np.int32]] = {}

    def __enter__(self) -> ImageStore:
        with accessing(self.path):
            self._sink = pa.OSFile(str(self.path), "wb")
            self._writer = pa.ipc.new_stream(self._sink, SCHEMA)
        return self

    def __exit__(self, *error: object) -> None:
        with accessing(self.path):
            self._writer.close()
            self._sink.close()
        if not self.numbers:
            self.path.unlink()

    def add(self, reference: Any, base: Path) -> str:
        """Keeps an image and returns its digest. reference: as in a file (`content_of`). base: the
        folder from which its paths start. Raises BadRow for what is no image."""
        content = content_of(reference, base)
        digest = hashlib.sha256(content).hexdigest()[:32]
        if digest not in self.numbers:
            try:
                tokens = self.processor.tokens(content)
            except (OSError, ValueError, SyntaxError) as error:
                raise BadRow(f"an image cannot be read: {first_line(error)}") from None
            batch = pa.record_batch([[digest], [content]], schema=SCHEMA)
            with accessing(self.path):
                self._writer.write_batch(batch)
            self.numbers[digest] = len(self.numbers)
            # Most images have the same tokens as another.
            self._tokens[digest] = self._distinct.setdefault(tokens.tobytes(), tokens)
        return digest

    def tokens(self, digest: str) -> NDArray[np.int32]:
        """Returns the (S,) int32 ids that stand for an image that was added."""
        return self._tokens[digest]


def content_of(reference: Any, base: Path) -> bytes:
    """Returns the bytes of an image file. reference: a path, the bytes, a data URL, or an object
    with one of `KEYS`. Raises BadRow for anything else, and for a file that is not there."""
    if isinstance(reference, dict):
        found = next((reference[key] for key in KEYS if reference.get(key) is not None), None)
        if found is None:
            raise BadRow(f"an image is an object with none of the keys {', '.join(KEYS)}")
        return content_of(f"data:,{found}" if reference.get("base64") is found else found, base)
    if isinstance(reference, (bytes, bytearray)):
        return bytes(reference)
    if not isinstance(reference, str):
        raise BadRow(f"an image is {type(reference).__name__}, expected a path or its bytes")
    if reference.startswith("data:"):
        try:
            return base64.b64decode(reference.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRow(f"the data URL of an image is not base64: {error}") from None
    if "://" in reference and not reference.startswith("file://"):
        raise BadRow(
            f"the image {reference[:80]} is an address on the network, and a run downloads no"
            " images. Download them, and name the files"
        )
    path = base / reference.removeprefix("file://")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRow(f"the image {path} cannot be read: {error.strerror}") from None


def place_images(
    messages: list[Message], column: Any, store: ImageStore | None, base: Path
) -> None:
    """Gives every message the digests of its images.

    Images stand in parts of messages, or in a column of the row. Those of the column belong to
    parts without an image, else to `PLACE` in texts, else they are in front of the first question.
    Raises BadRow if places and images are not of one number, and for an answer with an image.
    """
    waiting = [image for image in _listed(column) if image not in (None, "", {})]
    if store is None:
        if any(m.get("images") for m in messages):
            raise BadRow(
                "has an image, and the models of this config read text only (their tokenizer has no"
                " processor of images)"
            )
        return
    readers = [m for m in messages if m["role"] in READERS]
    if waiting and not any(m.get("images") for m in messages):
        for message in readers:
            message["content"] = message["content"].replace(PLACE, IMAGE)
            message["images"] = [None] * message["content"].count(IMAGE)
        if not any(m["images"] for m in readers) and readers:
            first = next((m for m in readers if m["role"] == "user"), readers[0])
            first["content"] = IMAGE * len(waiting) + first["content"]
            first["images"] = [None] * len(waiting)
    num_places = sum(image is None for m in messages for image in m.get("images", ()))
    if num_places != len(waiting):
        raise BadRow(
            f"has {counted(num_places, 'place')} for images (parts of the kind `image`, or {PLACE}"
            f" in a text) and {counted(len(waiting), 'image')} in its column"
        )
    column_images = iter(waiting)
    for message in messages:
        given = message.pop("images", [])
        if not given:
            continue
        if message["role"] not in READERS:
            raise BadRow("an answer has an image; a model of language writes text only")
        if message["content"].count(IMAGE) != len(given):
            raise BadRow("a text holds the character U+FFFC, which stands for an image here")
        message["images"] = [
            store.add(next(column_images) if image is None else image, base) for image in given
        ]


def _listed(column: Any) -> list[Any]:
    if column is None:
        return []
    return column if isinstance(column, list) else [column]
