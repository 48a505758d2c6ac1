"""Token losses of a linear head, without gradients, for scoring and evaluation.

    nll[t] = logsumexp(logits[t]) - logits[t, labels[t]],  logits = softcap(scale * (hidden @
    weight.T + bias))

Computed in chunks of rows, so that no (T, V) tensor lives beyond a chunk.

Axes: T rows that predict a response token, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.backends import choose_backend, softcapped
from sftmix.kernels.chunked_linear_mixup import balanced_chunks, check_rows, logits_of
from sftmix.kernels.fused_linear_mixup_cross_entropy import (
    IGNORE_INDEX,
    check_arguments,
    under_autocast,
)
from sftmix.kernels.pair_epilogue import pieces_in_cache


def linear_token_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> Tensor:
    """Returns (T,) float32 negative log-likelihoods in nats, 0 where the label is ignored; no
    gradient.

    hidden: (T, D); weight: (V, D); labels: (T,) int64; bias: (V,) or None. Backends and errors as
    `fused_linear_mixup_cross_entropy`.
    """
    return linear_token_scores(
        hidden, weight, labels, bias, logit_scale, logit_softcap, ignore_index, backend
    )[0]


def linear_token_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the (T,) float32 losses of `linear_token_nll`; a (T,) bool tensor that is True where
    no token is more likely than the label; and (T,) float32, the losses that the likeliest tokens
    would have. If all tokens of a response match, greedy decoding would have produced it (except
    for ties). Where the label is ignored: 0, False, 0."""
    hidden, weight, bias = under_autocast(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    )
    check_arguments(hidden, weight, labels, bias=bias)
    scale = 1.0 if logit_scale is None else float(logit_scale)
    cap = None if logit_softcap is None else float(logit_softcap)
    backend, labels = choose_backend(backend, hidden), labels.to(torch.int64)
    if backend == "reference":
        return _reference(hidden, weight, bias, labels, scale, cap, ignore_index)
    return _chunked_token_nll(hidden, weight, bias, labels, scale, cap, ignore_index, backend)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    cap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, all logits at once."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    logits = softcapped(
        scale * torch.nn.functional.linear(hidden, weight, bias).to(accumulate), cap
    )
    has_label = labels != ignore_index
    at_label = logits.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    total, maximum = torch.logsumexp(logits, dim=1), logits.amax(dim=1)
    nll, top_nll = (
        torch.where(has_label, total - chosen, 0.0).float() for chosen in (at_label, maximum)
    )
    return nll, (at_label >= maximum) & has_label, top_nll


@torch.library.custom_op("sftmix::chunked_token_nll", mutates_args=())
def _chunked_token_nll(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    check_rows(labels, labels.new_empty(0, 2), vocab_size, ignore_index)
    row_nll = row_nll_torch
    if backend == "triton":
        from sftmix.kernels.pair_epilogue_triton import row_nll

    nll, top_nll = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    match = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
    chunks = balanced_chunks(num_rows, vocab_size, hidden.element_size())
    slab = hidden.new_empty(max((stop - start for start, stop in chunks), default=0), vocab_size)
    for start, stop in chunks:
        logits = logits_of(hidden[start:stop], weight, bias, out=slab[: stop - start])
        row_nll(
            logits,
            labels[start:stop],
            logit_scale,
            logit_softcap,
            ignore_index,
            nll[start:stop],
            match[start:stop],
            top_nll[start:stop],
        )
    return nll, match, top_nll


@_chunked_token_nll.register_fake
def _(hidden, *_):  # type: ignore[no-untyped-def]
    kinds = (torch.float32, torch.bool, torch.float32)
    return tuple(hidden.new_empty(hidden.shape[0], dtype=kind) for kind in kinds)


def row_nll_torch(
    logits: Tensor,
    labels: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    nll: Tensor,
    match: Tensor,
    top_nll: Tensor,
) -> None:
    """Fills nll (N,), match (N,) and top_nll (N,) from raw logits (N, V), which are overwritten."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    for rows in pieces_in_cache(logits, accumulate):
        piece = logits[rows].to(accumulate)
        if logit_scale != 1.0:
            piece *= logit_scale
        piece = softcapped(piece, logit_softcap)
        maximum = piece.amax(dim=1, keepdim=True)
        at_label = piece.gather(1, labels[rows].clamp(min=0)[:, None])
        has_label = labels[rows] != ignore_index
        match[rows] = (at_label >= maximum).squeeze(1) & has_label
        top = piece.sub_(maximum).exp_().sum(dim=1).log()
        loss = top - (at_label - maximum).squeeze(1)
        nll[rows] = torch.where(has_label, loss, 0.0).float()
        top_nll[rows] = torch.where(has_label, top, 0.0).float()
