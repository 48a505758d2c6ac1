"""The tensors of a micro-batch.

Axes: B examples, S positions, T rows that predict a response token, M mixed positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.batches.cut import Units
from sftmix.batches.documents import Documents, pack
from sftmix.batches.examples import TokenisedExamples
from sftmix.batches.images import ImageInputs
from sftmix.batches.mixed_inputs import MixedInputs, mix_inputs
from sftmix.batches.pair_rows import pair_rows
from sftmix.pairing.matching import StepUnits

# of a MicroBatch
TENSORS = ("input_ids", "attention_mask", "rows", "labels", "owner", "pairs", "lam")


@dataclass(frozen=True)
class MicroBatch:
    """input_ids, attention_mask: (B, S) int64. rows: (T,) int64, flat positions b * S + s whose
    hidden state predicts a response token; partners' rows need not be neighbours. labels: (T,)
    int64, the tokens predicted. owner: (T,) int64, which of the B examples a row belongs to. pairs:
    (M, 2) int64 indices into the T rows. lam: (M,) float32. indices: dataset index of each example;
    empty in a micro-batch that a rank runs only to stay in lock step. mixed_inputs: the third
    sequences, where mixing happens at the input embeddings. documents: of a packed micro-batch, in
    which B is 1 for the tensors above: its examples follow one another in one row. row_weights:
    (T,) float32, factors of the rows' next-token losses, where the objective weights examples.
    images: further arguments of the model's forward, where the data set has images; the last of the
    B rows may then be there for its image alone."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    labels: Tensor
    owner: Tensor
    pairs: Tensor
    lam: Tensor
    indices: tuple[int, ...]
    mixed_inputs: MixedInputs | None = None
    documents: Documents | None = None
    row_weights: Tensor | None = None
    images: dict[str, Tensor] | None = None

    @property
    def num_real_tokens(self) -> int:
        rows = self.attention_mask[: len(self.indices)]  # a packed micro-batch has one
        return int(rows.sum())

    def sum_by_example(self, values: Tensor) -> Tensor:
        """Returns (B,) float64: sums of (T,) values over each example's response tokens, on the
        device of the values."""
        owner = self.owner.to(values.device, non_blocking=True)
        sums = torch.zeros(len(self.indices), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, owner, values.double())

    def to(self, device: torch.device | str) -> MicroBatch:
        """Returns the same micro-batch on another device."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=True) for name in TENSORS
        }
        if self.mixed_inputs is not None:
            moved["mixed_inputs"] = self.mixed_inputs.to(device)
        if self.row_weights is not None:
            moved["row_weights"] = self.row_weights.to(device, non_blocking=True)
        if self.documents is not None:
            moved["documents"] = self.documents.to(device)
        if self.images is not None:
            moved["images"] = {
                name: tensor.to(device, non_blocking=True) for name, tensor in self.images.items()
            }
        return replace(self, **moved)

    def pinned(self) -> MicroBatch:
        """Returns the same micro-batch in page-locked memory."""
        pinned: dict[str, Any] = {name: getattr(self, name).pin_memory() for name in TENSORS}
        if self.images is not None:
            pinned["images"] = {name: value.pin_memory() for name, value in self.images.items()}
        return replace(self, **pinned)

    def packed(self) -> MicroBatch:
        """Returns the same examples one after another in one row, without padding."""
        assert self.images is None, "the engine packs no model that reads images"
        documents, tokens, place = pack(self.attention_mask)
        ids = self.input_ids.reshape(1, -1)[:, tokens]
        mixed_inputs = self.mixed_inputs and self.mixed_inputs.packed(place)
        return replace(
            self,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            rows=place[self.rows],
            documents=documents,
            mixed_inputs=mixed_inputs,
        )


def collate(
    examples: TokenisedExamples,
    plan: StepUnits,
    units: Units,
    *,
    pad_id: int,
    mixes_inputs: bool = False,
    packs: bool = False,
) -> MicroBatch:
    """Returns the tensors of one micro-batch; without units, one padding token without loss.
    `mixes_inputs` adds the sequences of mixed input embeddings. packs: examples follow one another
    in one row."""
    indices: list[int] = []
    partners: list[tuple[int, int, float]] = []  # places in `indices` of a pair, and its lam
    for unit in units:
        first, second = plan.units[unit]
        indices.append(int(first))
        if second >= 0:
            indices.append(int(second))
            partners.append((len(indices) - 2, len(indices) - 1, float(plan.lam[unit])))
    tokens = [examples.tokens(i) for i in indices]
    return build_micro_batch(
        tokens,
        partners,
        indices=tuple(indices),
        pad_id=pad_id,
        mixes_inputs=mixes_inputs,
        packs=packs,
        images=examples.images(indices),
    )


def build_micro_batch(
    tokens: list[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    partners: list[tuple[int, int, float]],
    *,
    indices: tuple[int, ...],
    pad_id: int,
    mixes_inputs: bool = False,
    packs: bool = False,
    images: ImageInputs | None = None,
) -> MicroBatch:
    """Returns a micro-batch of (ids, response mask) examples; `partners` lists (confident,
    unconfident, lam)."""
    if images is not None and images.filler is not None:
        tokens = [*tokens, (images.filler, np.zeros(len(images.filler), dtype=bool))]
    width = max((len(ids) for ids, _ in tokens), default=1)
    input_ids = np.full((max(1, len(tokens)), width), pad_id, dtype=np.int64)
    attention = np.zeros_like(input_ids)
    if not tokens:
        attention[0, 0] = 1  # an empty attention mask gives NaN in some models
    is_response = np.zeros(input_ids.shape, dtype=bool)
    for place, (tokens_here, mask) in enumerate(tokens):
        input_ids[place, : len(tokens_here)] = tokens_here
        attention[place, : len(tokens_here)] = 1
        is_response[place, : len(tokens_here)] = mask
    ids = torch.from_numpy(input_ids)
    members = torch.tensor([(a, b) for a, b, _ in partners], dtype=torch.int64).reshape(-1, 2)
    lam = torch.tensor([share for _, _, share in partners], dtype=torch.float64)
    found = pair_rows(ids, torch.from_numpy(is_response), members, lam)
    padded = MicroBatch(
        input_ids=ids,
        attention_mask=torch.from_numpy(attention),
        rows=found.rows,
        labels=found.labels,
        owner=found.rows // width,
        pairs=found.pairs,
        lam=found.lam,
        indices=indices,
        mixed_inputs=mix_inputs(tokens, partners, width=width) if mixes_inputs else None,
        images=None if images is None else images.of_batch(ids),
    )
    return padded.packed() if packs else padded
