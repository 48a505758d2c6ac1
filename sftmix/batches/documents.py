"""Examples one after another in one row of tokens, without padding.

Axes: K documents (examples), S tokens of the row.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """lengths: tokens of each document. bounds: (K + 1,) int32, first token of each document, and
    S. position_ids: (1, S) int64, from 0 in each document."""

    lengths: tuple[int, ...]
    bounds: Tensor
    position_ids: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Documents:
        """Returns documents of these lengths, each at least 1."""
        position_ids = torch.cat([torch.arange(length) for length in lengths])
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, bounds, position_ids[None])

    def to(self, device: torch.device | str) -> Documents:
        """Returns the same on another device."""
        return Documents(
            self.lengths,
            self.bounds.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
        )


def pack(attention_mask: Tensor) -> tuple[Documents, Tensor, Tensor]:
    """Returns how the rows of a padded batch follow one another in one row.

    attention_mask: (B, S) int64, 1 for tokens and 0 for padding on the right; at least one token.
    Returns the documents (one for each row with tokens), the (T,) flat positions of the tokens in
    the padded batch, and the (B * S,) position of each in the packed row, meaningless for padding.
    """
    flat = attention_mask.reshape(-1)
    lengths = tuple(int(n) for n in attention_mask.sum(1) if n)
    return Documents.of(lengths), flat.nonzero()[:, 0], flat.cumsum(0) - 1
