"""Token losses of a linear head without gradients: what scoring and evaluation read.

    nll[t] = logsumexp(logits[t]) - logits[t, labels[t]],  logits = softcap(scale * (hidden @ weight.T + bias))

Computed in chunks of rows, so that no (T, V) tensor lives beyond a chunk.

Axes: T rows that predict a response token, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.fused_linear_mixup_cross_entropy import IGNORE_INDEX, WORKSPACE_BYTES, _softcap, balanced_chunks


def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Returns (T,) float32 negative log-likelihoods in nats, 0 where the label is ignored.

    hidden: (T, D); weight: (V, D); labels: (T,) int64; bias: (V,) or None.
    """
    return linear_token_nll_and_match(hidden, weight, labels, bias, logit_scale, logit_softcap, ignore_index)[0]


@torch.no_grad()
def linear_token_nll_and_match(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor]:
    """Returns the (T,) float32 losses of `linear_token_nll` and a (T,) bool tensor: is the label the most
    likely token? A response all of whose tokens match is what greedy decoding would have written."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    nll = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    match = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    itemsize = torch.empty((), dtype=accumulate).element_size()
    for start, stop in balanced_chunks(hidden.shape[0], weight.shape[0], itemsize, WORKSPACE_BYTES):
        logits = torch.nn.functional.linear(hidden[start:stop], weight, bias).to(accumulate)
        if logit_scale is not None:
            logits *= logit_scale
        logits = _softcap(logits, logit_softcap)
        label = labels[start:stop]
        at_label = logits.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
        nll[start:stop] = ((torch.logsumexp(logits, dim=1) - at_label) * (label != ignore_index)).float()
        match[start:stop] = logits.argmax(dim=1) == label
    return nll, match
