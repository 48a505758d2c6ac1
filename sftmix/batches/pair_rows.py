"""The rows and pairs of a batch, for a training loop of your own around the loss.

Axes: B examples, S positions, P pairs of examples, T rows that predict a response token, M mixed
positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PairRows(NamedTuple):
    """What the loss reads of a batch.

    rows: (T,) int64, flat positions b * S + s whose hidden state predicts a response token.
    labels: (T,) int64, the tokens that they predict. pairs: (M, 2) int64, indices into the T rows,
    of the confident and the unconfident example. lam: (M,) float32, the share of the confident one.
    """

    rows: Tensor
    labels: Tensor
    pairs: Tensor
    lam: Tensor


def pair_rows(input_ids: Tensor, response_mask: Tensor, pairs: Tensor, lam: Tensor) -> PairRows:
    """Returns the rows of a batch, aligned at the first response token of each pair's members.

    A pair mixes the first min(N_c, N_u) response tokens (https://arxiv.org/abs/2410.05248, section
    3); the rest of the longer response has next-token prediction only.

    input_ids: (B, S) int64. response_mask: (B, S) bool, True for tokens of the response. pairs: (P,
    2) int64, the confident and the unconfident example of each pair; an example is in one pair at
    most. lam: (P,) floats in [0, 1]. Nothing predicts the first token of a sequence, so its mask is
    ignored. Raises ValueError for wrong shapes, and for an example in two pairs.
    """
    if input_ids.dim() != 2 or response_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and response_mask"
            f" {tuple(response_mask.shape)}, expected (B, S) for both"
        )
    if pairs.shape != (len(lam), 2):
        raise ValueError(
            f"pairs has shape {tuple(pairs.shape)} and lam {tuple(lam.shape)}, expected (P, 2) and"
            " (P,)"
        )
    if len(pairs.unique()) != pairs.numel():
        raise ValueError("an example is in two pairs; each may be in one")
    predicted = response_mask[:, 1:].bool()
    owner, position = predicted.nonzero(as_tuple=True)
    counts = predicted.sum(dim=1)
    first = counts.cumsum(0) - counts  # of each example, among the rows
    mixed = counts[pairs].amin(dim=1)  # (P,)
    of_pair = torch.repeat_interleave(torch.arange(len(pairs), device=pairs.device), mixed)
    step = torch.arange(len(of_pair), device=pairs.device)
    step = step - (mixed.cumsum(0) - mixed)[of_pair]  # from 0 in each pair
    return PairRows(
        rows=owner * input_ids.shape[1] + position,
        labels=input_ids[owner, position + 1],
        pairs=first[pairs[of_pair]] + step[:, None],
        lam=lam[of_pair].float(),
    )
