"""Weights of tokens in the next-token loss, as published objectives define them. Each weight is a
number, not a part of the graph: the loss of row t is weight_t * NTP_t.

    none           1
    dft            p_t, the probability of the label               (DFT, arXiv 2508.05629)
    eaft           (H_t / 3)^alpha, entropy over the 20 likeliest tokens; ln 20 is nearly 3
                   (EAFT, arXiv 2601.02151, the authors' code and LLaMA-Factory)
    eaft_unscaled  H_t^alpha                                       (the same name in Axolotl)

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.backends import softcapped
from sftmix.kernels.pair_epilogue import pieces_in_cache

WEIGHTINGS = ("none", "dft", "eaft", "eaft_unscaled")
EAFT_TOKENS = 20
GROUP_COLUMNS = 64  # of the vocabulary, whose maximum is taken first
EAFT_SCALE = 3.0  # the authors divide by it, for ln 20 = 2.9957


def entropy_weights(
    weighting: str,
    alpha: float,
    logits: Tensor,
    labels: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Returns the (N,) weights of EAFT, float32 (float64 for float64 logits); 0 where the label is
    ignored. (DFT's are not computed here: the epilogue has the probability at hand.)

    weighting: "eaft" or "eaft_unscaled". alpha: exponent. logits: (N, V), raw: before scale and
    soft-cap; unchanged. labels: (N,) int64.
    """
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.new_empty(logits.shape[0], dtype=accumulate)
    for piece in pieces_in_cache(logits, accumulate):
        # scale > 0 and the soft-cap keep the order, so only the likeliest are scaled and capped
        ordered = logits[piece] if logit_scale >= 0 else -logits[piece]
        top = largest(ordered, min(EAFT_TOKENS, logits.shape[1]))
        shown = softcapped(abs(logit_scale) * top.to(accumulate), logit_softcap)
        log_p = torch.log_softmax(shown, dim=1)
        entropy = torch.special.entr(log_p.exp()).sum(dim=1)
        weights[piece] = (entropy / (EAFT_SCALE if weighting == "eaft" else 1.0)) ** alpha
    return torch.where(labels != ignore_index, weights, 0.0)


def largest(values: Tensor, count: int) -> Tensor:
    """Returns the (N, count) largest of (N, V) values in each row, in no order.

    They are in the `count` groups of columns with the largest maxima: a value in another group has
    `count` maxima above it. So only the maxima need a pass over all columns, which takes a fraction
    of `torch.topk` over them. The columns of a group are `num_groups` apart, so that the maxima are
    taken along contiguous memory.
    """
    num_groups = values.shape[1] // GROUP_COLUMNS
    if num_groups > count:
        groups = values[:, : num_groups * GROUP_COLUMNS].unflatten(1, (GROUP_COLUMNS, num_groups))
        chosen = torch.topk(groups.amax(dim=1), count, dim=1, sorted=False).indices
        inside = groups.gather(2, chosen[:, None].expand(-1, GROUP_COLUMNS, -1)).flatten(1)
        values = torch.cat([inside, values[:, num_groups * GROUP_COLUMNS :]], dim=1)
    return torch.topk(values, count, dim=1, sorted=False).values


def weights_by_definition(weighting: str, alpha: float, log_p: Tensor, labels: Tensor) -> Tensor:
    """Returns the (N,) weights from log probabilities (N, V), as the module's table states them.
    labels: (N,), none ignored."""
    if weighting == "dft":
        return log_p.gather(1, labels[:, None]).squeeze(1).exp()
    if weighting in ("eaft", "eaft_unscaled"):
        top = log_p.sort(dim=1, descending=True).values[:, :EAFT_TOKENS].exp()
        p = top / top.sum(dim=1, keepdim=True)
        entropy = -torch.xlogy(p, p).sum(dim=1)
        return (entropy / (EAFT_SCALE if weighting == "eaft" else 1.0)) ** alpha
    return log_p.new_ones(len(log_p))
