"""The losses and logit gradients of a chunk of raw logits, in place: definition and plain PyTorch.

Rows 2i and 2i + 1 of the chunk are the confident and the unconfident member of pair i; the rows behind the
pairs stand alone. With z the scaled raw logits, s the soft-cap (identity where there is none), y the labels,

    l_c = s(z_c)    l_u = s(z_u)    l_m = s(lam z_c + (1 - lam) z_u)
    nll_r = logsumexp(l_r) - l_r[y_r]                         mixup = logsumexp(l_m) - lam l_m[y_c] - (1 - lam) l_m[y_u]
    g_r = w_ntp s'(z_r) (softmax(l_r) - onehot(y_r))          g_m = w_mix s'(z_m) (softmax(l_m) - y~)
    dz_c = g_c + lam g_m                                      dz_u = g_u + (1 - lam) g_m

All versions have one signature: `pair_epilogue_reference` (autograd), `pair_epilogue_torch` (in place, any device),
and `pair_epilogue` in `pair_epilogue_triton.py`.

Axes: N rows of the chunk, M pairs among them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 1 << 20  # of logits in one piece on a CPU; measured in benchmarks/kernels.py


def pair_epilogue_reference(
    logits: Tensor,
    labels: Tensor,
    lam: Tensor,
    ntp_weight: Tensor,
    mixup_weight: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    want_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """The definition, by autograd in plain PyTorch. Arguments and results as `pair_epilogue`."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    raw = logits.detach().to(accumulate).requires_grad_()
    num_pairs = lam.shape[0]
    share = lam.to(accumulate)[:, None]

    def log_probabilities(scaled: Tensor) -> Tensor:
        capped = scaled if logit_softcap is None else logit_softcap * torch.tanh(scaled / logit_softcap)
        return torch.log_softmax(capped, dim=1)

    valid = labels != ignore_index
    safe = labels.clamp(min=0)[:, None]
    with torch.enable_grad():
        scaled = raw * logit_scale
        nll = torch.where(valid, -log_probabilities(scaled).gather(1, safe).squeeze(1), 0.0)
        confident, unconfident = scaled[0 : 2 * num_pairs : 2], scaled[1 : 2 * num_pairs : 2]
        log_p = log_probabilities(share * confident + (1 - share) * unconfident)
        targets = safe[: 2 * num_pairs]
        mixup = -(share * log_p.gather(1, targets[0::2]) + (1 - share) * log_p.gather(1, targets[1::2])).squeeze(1)
        mixup = torch.where(valid[: 2 * num_pairs].view(-1, 2).all(dim=1), mixup, 0.0)
        loss = (nll * ntp_weight).sum() + (mixup * mixup_weight).sum()
    if want_gradient:
        (gradient,) = torch.autograd.grad(loss, raw)
        logits.copy_(gradient.to(logits.dtype))
    return nll.detach(), mixup.detach()


def pair_epilogue_torch(
    logits: Tensor,
    labels: Tensor,
    lam: Tensor,
    ntp_weight: Tensor,
    mixup_weight: Tensor,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    want_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the (N,) NTP and (M,) Mixup losses in nats, and overwrites the raw logits with their gradient.

    logits: (N, V), contiguous rows; labels: (N,) int64; lam: (M,), M <= N // 2, share of row 2i in pair i.
    ntp_weight, mixup_weight: 0-d tensors, what each row's and each pair's gradient is multiplied by; they stay on
    the device. Losses are float32 (float64 for float64 logits) and are not multiplied by them.
    A row with an ignored label gives 0 and exact zeros, and so does the mixed part of a pair with one.
    `want_gradient=False`: the logits' content is undefined afterwards.
    """
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    nll = logits.new_empty(logits.shape[0], dtype=accumulate)
    mixup = logits.new_empty(lam.shape[0], dtype=accumulate)
    valid = labels != ignore_index
    target = labels.clamp(min=0)[:, None]
    share = lam.to(accumulate)[:, None]
    options = (ntp_weight, mixup_weight, logit_scale, logit_softcap, want_gradient)
    for rows in pieces_in_cache(logits, accumulate):
        pairs = slice(min(rows.start // 2, len(mixup)), min(rows.stop // 2, len(mixup)))
        nll[rows], mixup[pairs] = _epilogue_of_piece(logits[rows], target[rows], valid[rows], share[pairs], *options)
    return nll, mixup


def pieces_in_cache(logits: Tensor, accumulate: torch.dtype) -> Iterator[slice]:
    """Yields ranges of whole pairs of rows. A dozen passes go over the logits: on a CPU, over a piece that stays in its
    cache meanwhile; elsewhere all rows are one piece."""
    num_rows, vocab_size = logits.shape
    size = max(1, num_rows)
    if logits.device.type == "cpu":
        size = max(2, CACHE_BYTES // (vocab_size * accumulate.itemsize) // 2 * 2)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def _epilogue_of_piece(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    share: Tensor,
    ntp_weight: Tensor,
    mixup_weight: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    want_gradient: bool,
) -> tuple[Tensor, Tensor]:
    raw = logits.to(share.dtype)  # the same tensor where it has this dtype already
    if logit_scale != 1.0:
        raw *= logit_scale
    paired = 2 * share.shape[0]
    mixup = share.new_zeros(0)
    mixed = None
    if paired:  # the mixed part is read off the raw logits first: the NTP part then overwrites them
        mixed = (raw[0:paired:2] * share).addcmul_(raw[1:paired:2], 1 - share)  # lerp makes NaN of two -inf
        alive = valid[:paired].view(-1, 2).all(dim=1)
        targets = ((target[0:paired:2], share), (target[1:paired:2], 1 - share))
        mixup = _loss_and_gradient_in_place(mixed, targets, alive, mixup_weight, logit_softcap, want_gradient)
    nll = _loss_and_gradient_in_place(raw, ((target, None),), valid, ntp_weight, logit_softcap, want_gradient)
    if want_gradient:
        if mixed is not None:
            raw[0:paired:2].addcmul_(mixed, share)
            raw[1:paired:2].addcmul_(mixed, 1 - share)
        if logit_scale != 1.0:
            raw *= logit_scale
        if raw is not logits:
            logits.copy_(raw)
    return nll, mixup


def _loss_and_gradient_in_place(
    logits: Tensor,
    targets: tuple[tuple[Tensor, Tensor | None], ...],
    alive: Tensor,
    weight: Tensor,
    softcap: float | None,
    want_gradient: bool,
) -> Tensor:
    """Returns (N,) cross-entropy of (N, V) logits against targets given as (index (N, 1), share (N, 1)), 0 where a row
    is not `alive`, and overwrites the logits with `weight` times the gradient."""
    d_softcap: Tensor | None = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        d_softcap = 1 - logits.square() if want_gradient else None
        logits.mul_(softcap)
    # exp is taken once, of the logits less their maximum, for the loss and the gradient both.
    logits.sub_(logits.amax(dim=1, keepdim=True))
    nll = torch.zeros_like(logits[:, 0])
    for index, share in targets:
        at_target = logits.gather(1, index)
        nll -= (at_target if share is None else share * at_target).squeeze(1)
    total = logits.exp_().sum(dim=1, keepdim=True)
    nll += total.squeeze(1).log()
    if want_gradient:
        logits.mul_(weight / total)
        for index, share in targets:
            at_target = -weight.to(total.dtype).expand_as(total)
            logits.scatter_add_(1, index, at_target if share is None else share * at_target)
        if d_softcap is not None:
            logits.mul_(d_softcap)
        # Filled, not multiplied by 0: a dead row leaves exact zeros where its logits are infinite, too.
        if logits.device.type == "cpu":
            logits.index_fill_(0, (~alive).nonzero().squeeze(1), 0.0)
        else:  # the same without waiting for the device
            logits.masked_fill_(~alive[:, None], 0.0)
    return torch.where(alive, nll, torch.zeros_like(nll))
