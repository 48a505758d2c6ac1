"""The encoded examples of the data stage, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftmix.batches.images import ExampleImages, ImageInputs
from sftmix.errors import ArtifactError, DataError, counted


class TokenisedExamples:
    """The rows of one Arrow file of the data stage, memory-mapped. Only the lengths become arrays,
    on first use."""

    def __init__(self, path: Path):
        import datasets

        if not path.is_file():
            raise ArtifactError(
                f"{path} is missing. Run the data stage first (`sftmix data CONFIG`)."
            )
        self.table = datasets.Dataset.from_file(str(path), in_memory=False)
        self._tokens = self.table.select_columns(["input_ids", "response_mask"]).with_format(
            "numpy"
        )
        self.example_ids: pa.ChunkedArray = self.table.data.table["example_id"]
        self._folder = path.parent

    def __len__(self) -> int:
        return len(self.example_ids)

    def column(self, name: str) -> NDArray[Any]:
        """Returns a column of numbers, (N,), in the dtype that it has on disk."""
        return np.asarray(self.table.data.table[name])

    @cached_property
    def num_tokens(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self.column("num_tokens").astype(np.int64)

    @cached_property
    def num_response_tokens(self) -> NDArray[np.int64]:
        """(N,) int64."""
        return self.column("num_response_tokens").astype(np.int64)

    @cached_property
    def _images(self) -> ExampleImages | None:
        if "images" not in self.table.column_names:
            return None
        return ExampleImages(self._folder, self.table.data.table["images"])

    def images(self, indices: Sequence[int]) -> ImageInputs | None:
        """Returns the images of a micro-batch; None if no example of the data set has any."""
        return None if self._images is None else self._images.of(indices)

    def check_single_spans(self) -> None:
        """Raises DataError for an example whose response tokens are not one span, as in a
        conversation of several turns, and for a data set with images."""
        if self._images is not None:
            raise DataError(
                "mixup.site is input_embeddings, which cannot interpolate images, and the data has"
                " some. Use mixup.site=head."
            )
        masks = self.table.data.table.column("response_mask").combine_chunks()
        flat = masks.values.to_numpy(zero_copy_only=False)
        starts = np.diff(flat.astype(np.int8), prepend=0) == 1
        starts[masks.offsets.to_numpy()[:-1]] = flat[masks.offsets.to_numpy()[:-1]]
        spans = np.add.reduceat(starts, masks.offsets.to_numpy()[:-1])
        several = np.flatnonzero(spans > 1)
        if len(several):
            raise DataError(
                "mixup.site is input_embeddings, which aligns one response per example, and"
                f" {counted(len(several), 'example has', 'examples have')} several (of"
                f" {len(self):,}), first {self.example_ids[int(several[0])].as_py()}. Use"
                " mixup.site=head, or data with a single turn."
            )

    def tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Returns the (S,) token ids and the (S,) response mask of one example."""
        row = self._tokens[int(index)]
        return np.asarray(row["input_ids"], dtype=np.int32), np.asarray(
            row["response_mask"], dtype=bool
        )
