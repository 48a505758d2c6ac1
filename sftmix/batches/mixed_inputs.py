"""Which embeddings are interpolated when mixing happens at the input (`mixup.site:
input_embeddings`).

An ablation, not the method: the transformer reads a third sequence per pair, made of both members'
input embeddings, and its head predicts both members' tokens. Members are aligned at their first
response token; where only one has a token (the beginning of the longer prompt), its embedding is
used unmixed. The sequence ends with the shorter response.

Axes: B examples, S positions of the micro-batch; P pairs, L positions of all mixed sequences
together, R their width, M mixed positions that predict.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.batches.documents import Documents, pack


@dataclass(frozen=True)
class MixedInputs:
    """sources: (L, 2) int64, flat positions b * S + s of the confident and of the unconfident
    embedding, equal if unmixed. source_lam: (L,) float32. places: (L,) int64, their flat positions
    p * R + r in the result. attention_mask: (P, R) int64. rows: (M,) int64, flat positions p * R +
    r that predict. labels: (M, 2) int64, the confident's and the unconfident's token. lam: (M,)
    float32. documents: of packed sequences, which follow one another in one row (P is 1). Without
    pairs: one masked-out position, M = 0."""

    sources: Tensor
    source_lam: Tensor
    places: Tensor
    attention_mask: Tensor
    rows: Tensor
    labels: Tensor
    lam: Tensor
    documents: Documents | None = None

    def to(self, device: torch.device | str) -> MixedInputs:
        """Returns the same on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device, non_blocking=True)
            elif value is not None:
                moved[field.name] = value.to(device)
        return MixedInputs(**moved)

    def packed(self, place: Tensor) -> MixedInputs:
        """Returns the same sequences one after another in one row. place: (B * S,), where the
        flat positions of the padded micro-batch are in the packed one."""
        documents, tokens, own_place = pack(self.attention_mask)
        return replace(
            self,
            sources=place[self.sources],
            places=own_place[self.places],
            attention_mask=self.attention_mask.new_ones(1, len(tokens)),
            rows=own_place[self.rows],
            documents=documents,
        )


def mix_inputs(
    tokens: list[tuple[NDArray[np.int32], NDArray[np.bool_]]],
    partners: list[tuple[int, int, float]],
    *,
    width: int,
) -> MixedInputs:
    """Returns the mixed sequences of a micro-batch of (ids, response mask) examples padded to
    `width`; `partners` lists (confident, unconfident, lam). Every response must be one span, as
    `check_single_spans` ensures."""
    sequences = []
    for confident, unconfident, lam in partners:
        (ids_c, mask_c), (ids_u, mask_u) = tokens[confident], tokens[unconfident]
        first_c, first_u = int(mask_c.argmax()), int(mask_u.argmax())
        mixed = min(int(mask_c.sum()), int(mask_u.sum()))
        prompt = max(first_c, first_u)
        # the last label is predicted from the position before it
        position = np.arange(prompt + mixed - 1)
        at_c, at_u = position - (prompt - first_c), position - (prompt - first_u)
        source_c, source_u = confident * width + at_c, unconfident * width + at_u
        source_c, source_u = (
            np.where(at_c < 0, source_u, source_c),
            np.where(at_u < 0, source_c, source_u),
        )
        labels = np.stack(
            [ids_c[first_c : first_c + mixed], ids_u[first_u : first_u + mixed]], axis=1
        ).astype(np.int64)
        sequences.append(
            (np.stack([source_c, source_u], axis=1), prompt - 1 + np.arange(mixed), labels, lam)
        )

    longest = max((len(sources) for sources, *_ in sequences), default=1)
    attention = torch.zeros(max(1, len(sequences)), longest, dtype=torch.int64)
    if not sequences:
        attention[0, 0] = 1  # an empty attention mask gives NaN in some models
    for row, (sources, *_) in enumerate(sequences):
        attention[row, : len(sources)] = 1

    def joined(parts: list[NDArray[np.int64]], *shape: int) -> Tensor:
        return torch.from_numpy(
            np.concatenate([np.zeros((0, *shape), dtype=np.int64), *parts]).astype(np.int64)
        )

    def shares(lengths: list[int]) -> Tensor:
        return torch.tensor([lam for *_, lam in sequences], dtype=torch.float32).repeat_interleave(
            torch.tensor(lengths, dtype=torch.int64)
        )

    return MixedInputs(
        sources=joined([sources for sources, *_ in sequences], 2),
        source_lam=shares([len(sources) for sources, *_ in sequences]),
        places=joined(
            [row * longest + np.arange(len(sources)) for row, (sources, *_) in enumerate(sequences)]
        ),
        attention_mask=attention,
        rows=joined([row * longest + rows for row, (_, rows, _, _) in enumerate(sequences)]),
        labels=joined([labels for _, _, labels, _ in sequences], 2),
        lam=shares([len(rows) for _, rows, _, _ in sequences]),
    )
