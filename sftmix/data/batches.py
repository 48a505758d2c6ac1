"""Micro-batches: how a step's examples are cut up over ranks, and the tensors of each piece.

The cut is a pure function of the plan, the lengths and the number of ranks, known to every rank: token
counts of the whole step need no communication, and all ranks run the same number of micro-batches, empty
ones where a rank has nothing left, so that no collective ever depends on data.

Axes: B examples, S positions, T rows that predict a response token, M mixed positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.data.mixed_inputs import MixedInputs, mix_inputs
from sftmix.errors import ArtifactError, DataError, counted
from sftmix.pairing import StepUnits


class TokenisedExamples:
    """The rows of one Arrow file of the data stage, memory-mapped; only the lengths become arrays, when they are asked for."""

    def __init__(self, path: Path):
        import datasets

        if not path.is_file():
            raise ArtifactError(f"{path} is missing. Run the data stage first (`sftmix data CONFIG`).")
        self.table = datasets.Dataset.from_file(str(path), in_memory=False)
        self._tokens = self.table.select_columns(["input_ids", "response_mask"]).with_format("numpy")
        self.example_ids: pa.ChunkedArray = self.table.data.table["example_id"]

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

    def check_single_spans(self) -> None:
        """Raises DataError for an example whose response tokens are not one span, as in a conversation of several turns."""
        masks = self.table.data.table.column("response_mask").combine_chunks()
        flat = masks.values.to_numpy(zero_copy_only=False)
        starts = np.diff(flat.astype(np.int8), prepend=0) == 1
        starts[masks.offsets.to_numpy()[:-1]] = flat[masks.offsets.to_numpy()[:-1]]
        spans = np.add.reduceat(starts, masks.offsets.to_numpy()[:-1])
        several = np.flatnonzero(spans > 1)
        if len(several):
            raise DataError(
                "mixup.site is input_embeddings, which aligns one response per example, and "
                f"{counted(len(several), 'example has', 'examples have')} several (of {len(self):,}), "
                f"first {self.example_ids[int(several[0])].as_py()}. Use mixup.site=head, or data with a single turn."
            )

    def tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Returns the (S,) token ids and the (S,) response mask of one example."""
        row = self._tokens[int(index)]
        return np.asarray(row["input_ids"], dtype=np.int32), np.asarray(row["response_mask"], dtype=bool)


@dataclass(frozen=True)
class StepCounts:
    """Token counts of a whole optimiser step, all ranks: what its loss sums are divided by."""

    num_ntp_tokens: int
    num_mixup_tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """input_ids, attention_mask: (B, S) int64. rows: (T,) int64, flat positions b * S + s whose hidden state
    predicts a response token; partners' rows need not be neighbours. labels: (T,) int64, the tokens predicted.
    owner: (T,) int64, which of the B examples a row belongs to. pairs: (M, 2) int64 indices into the T rows.
    lam: (M,) float32. indices: dataset index of each example; empty in a micro-batch that only keeps step.
    mixed_inputs: the third sequences, where mixing happens at the input embeddings."""

    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    labels: Tensor
    owner: Tensor
    pairs: Tensor
    lam: Tensor
    indices: tuple[int, ...]
    mixed_inputs: MixedInputs | None = None

    @property
    def num_real_tokens(self) -> int:
        return int(self.attention_mask.sum()) if self.indices else 0

    def to(self, device: torch.device | str) -> MicroBatch:
        """Returns the same micro-batch on another device."""
        names = ("input_ids", "attention_mask", "rows", "labels", "owner", "pairs", "lam")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        mixed_inputs = None if self.mixed_inputs is None else self.mixed_inputs.to(device)
        return MicroBatch(**moved, indices=self.indices, mixed_inputs=mixed_inputs)


Units = NDArray[np.int64]  # positions of units in a StepUnits


def count_step(plan: StepUnits, units: Units, num_response_tokens: NDArray[np.int64]) -> StepCounts:
    """Returns the counts of a step. A pair mixes min(N^c, N^u) positions, aligned from the first response token.

    The first token of a sequence is predicted by nothing; no template begins with a response, so none is lost.
    """
    members = plan.units[units]
    is_pair = members[:, 1] >= 0
    first = num_response_tokens[members[:, 0]]
    second = num_response_tokens[members[:, 1]]
    return StepCounts(
        num_ntp_tokens=int(first.sum() + second[is_pair].sum()),
        num_mixup_tokens=int(np.minimum(first, second)[is_pair].sum()),
    )


def cut_step(plan: StepUnits, units: Units, num_tokens: NDArray[np.int64], *, micro_batch_tokens: int, num_ranks: int) -> list[list[Units]]:
    """Returns the micro-batches of every rank: lists of units, the same number of lists for each rank.

    Units of like length share a micro-batch; its padded size (examples times longest) stays within
    `micro_batch_tokens` unless a single unit exceeds it. A pair is never cut. Where there are too few
    micro-batches to go round, the largest are halved; what is still missing is empty.
    """
    members = plan.units[units]
    size = 1 + (members[:, 1] >= 0)
    longest = np.where(size == 2, np.maximum(num_tokens[members[:, 0]], num_tokens[members[:, 1]]), num_tokens[members[:, 0]])

    pieces: list[list[int]] = []
    num_examples = 0
    for position in np.argsort(-longest, kind="stable"):
        num_examples += int(size[position])
        if not pieces or num_examples * int(longest[pieces[-1][0]]) > micro_batch_tokens:
            pieces.append([])
            num_examples = int(size[position])
        pieces[-1].append(int(position))

    def cost(piece: list[int]) -> int:
        return int(size[piece].sum()) * int(longest[piece[0]]) if piece else 0

    per_rank = -(-len(pieces) // num_ranks)
    while len(pieces) < per_rank * num_ranks:
        widest = max((p for p in pieces if len(p) > 1), key=cost, default=None)
        if widest is None:
            pieces.append([])
            continue
        half = len(widest) // 2
        pieces[pieces.index(widest) : pieces.index(widest) + 1] = [widest[:half], widest[half:]]

    # Longest first, each to the rank with the least work that still has room: the ranks wait for the slowest.
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for piece in sorted(pieces, key=cost, reverse=True):
        rank = min((r for r in range(num_ranks) if len(ranks[r]) < per_rank), key=lambda r: (load[r], r))
        ranks[rank].append(piece)
        load[rank] += cost(piece)
    return [[units[piece] if piece else units[:0] for piece in rank] for rank in ranks]


def collate(examples: TokenisedExamples, plan: StepUnits, units: Units, *, pad_id: int, mixes_inputs: bool = False) -> MicroBatch:
    """Returns the tensors of one micro-batch; for no units, one padding token that carries no loss. `mixes_inputs` adds
    the sequences of mixed input embeddings."""
    indices: list[int] = []
    partners: list[tuple[int, int, float]] = []  # places in `indices` of a pair, and its lam
    for unit in units:
        first, second = plan.units[unit]
        indices.append(int(first))
        if second >= 0:
            indices.append(int(second))
            partners.append((len(indices) - 2, len(indices) - 1, float(plan.lam[unit])))
    tokens = [examples.tokens(i) for i in indices]
    return build_micro_batch(tokens, partners, indices=tuple(indices), pad_id=pad_id, mixes_inputs=mixes_inputs)


def build_micro_batch(
    tokens: list[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    partners: list[tuple[int, int, float]],
    *,
    indices: tuple[int, ...],
    pad_id: int,
    mixes_inputs: bool = False,
) -> MicroBatch:
    """Returns a micro-batch of (ids, response mask) examples; `partners` lists (confident, unconfident, lam)."""
    width = max((len(ids) for ids, _ in tokens), default=1)
    input_ids = np.full((max(1, len(tokens)), width), pad_id, dtype=np.int64)
    attention = np.zeros_like(input_ids)
    if not tokens:
        attention[0, 0] = 1  # attention over nothing at all is NaN in some models
    rows, labels, owner, first_row = [], [], [], []
    num_rows = 0
    for place, (ids, mask) in enumerate(tokens):
        input_ids[place, : len(ids)] = ids
        attention[place, : len(ids)] = 1
        positions = np.flatnonzero(mask[1:])  # position s predicts token s + 1
        rows.append(place * width + positions)
        labels.append(ids[positions + 1].astype(np.int64))
        owner.append(np.full(len(positions), place, dtype=np.int64))
        first_row.append(num_rows)
        num_rows += len(positions)
    pairs, lam = [], []
    for a, b, share in partners:
        mixed = np.arange(min(len(rows[a]), len(rows[b])))
        pairs.append(np.stack([first_row[a] + mixed, first_row[b] + mixed], axis=1))
        lam.append(np.full(len(mixed), share, dtype=np.float32))

    def joined(parts: list[NDArray[np.int64]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention),
        rows=joined(rows),
        labels=joined(labels),
        owner=joined(owner),
        pairs=joined(pairs).reshape(-1, 2),
        lam=torch.from_numpy(np.concatenate(lam)) if lam else torch.zeros(0),
        indices=indices,
        mixed_inputs=mix_inputs(tokens, partners, width=width) if mixes_inputs else None,
    )
