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
from typing import NamedTuple

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
    members = ((raw[0:paired:2], share), (raw[1:paired:2], 1 - share))
    mixup = share.new_zeros(0)
    mixed: _Softmax | None = None
    if paired:  # the mixed part is read off the raw logits first: the NTP part then overwrites them
        alive = valid[:paired].view(-1, 2).all(dim=1)
        targets = ((target[0:paired:2], share), (target[1:paired:2], 1 - share))
        mixup, mixed = _softmax_in_place(*_mix(members), targets, alive, mixup_weight, logit_softcap, want_gradient)
    nll, alone = _softmax_in_place(raw, raw.amax(dim=1, keepdim=True), ((target, None),), valid, ntp_weight, logit_softcap, want_gradient)
    if want_gradient:
        raw.mul_(alone.factor)
        alone.subtract_targets(raw, None)
        if mixed is not None:
            for rows, part in members:
                rows.addcmul_(mixed.exponentials, part * mixed.factor)
                mixed.subtract_targets(rows, part)
        if logit_scale != 1.0:
            raw *= logit_scale
        if raw is not logits:
            logits.copy_(raw)
    return nll, mixup


def _mix(members: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns the mixed logits, and their maximum in each row."""
    (confident, share), (unconfident, rest) = members
    if confident.device.type == "cpu":
        mixed = torch.lerp(unconfident, confident, share)  # one pass instead of two
        maximum = mixed.amax(dim=1, keepdim=True)
        if not maximum.isnan().any():  # lerp takes a difference, which is NaN where both are -inf
            return mixed, maximum
    mixed = (confident * share).addcmul_(unconfident, rest)
    return mixed, mixed.amax(dim=1, keepdim=True)


class _Softmax(NamedTuple):
    """A gradient on its way: `factor * exponentials` less `amount` at each target. exponentials: (N, V), in place of the
    logits, times the derivative of the soft-cap; factor: (N, 1); targets: (index (N, 1), amount (N, 1))."""

    exponentials: Tensor
    factor: Tensor
    targets: list[tuple[Tensor, Tensor]]

    def subtract_targets(self, rows: Tensor, part: Tensor | None) -> None:
        for index, amount in self.targets:
            rows.scatter_add_(1, index, -(amount if part is None else part * amount))


def _softmax_in_place(
    logits: Tensor,
    maximum: Tensor,
    targets: tuple[tuple[Tensor, Tensor | None], ...],
    alive: Tensor,
    weight: Tensor,
    softcap: float | None,
    want_gradient: bool,
) -> tuple[Tensor, _Softmax]:
    """Returns (N,) cross-entropy of (N, V) logits, with their row maximum (N, 1), against targets given as (index (N, 1),
    share (N, 1)), and `weight` times its gradient, not yet put together. A row that is not `alive` has 0 and exact zeros."""
    d_softcap: Tensor | None = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        maximum = softcap * torch.tanh(maximum / softcap)
        d_softcap = 1 - logits.square() if want_gradient else None
        logits.mul_(softcap)
    # exp is taken once, of the logits less their maximum, for the loss and the gradient both.
    logits.sub_(maximum)
    nll = torch.zeros_like(logits[:, 0])
    for index, share in targets:
        at_target = logits.gather(1, index)
        nll -= (at_target if share is None else share * at_target).squeeze(1)
    total = logits.exp_().sum(dim=1, keepdim=True)
    nll += total.squeeze(1).log()
    amounts = []
    if want_gradient:
        for index, share in targets:
            amount = weight.to(total.dtype).expand_as(total) * (1.0 if share is None else share)
            amount = amount if d_softcap is None else amount * d_softcap.gather(1, index)
            amounts.append((index, torch.where(alive[:, None], amount, 0.0)))
        if d_softcap is not None:
            logits.mul_(d_softcap)
        # Filled, not multiplied by 0: a dead row leaves exact zeros where its logits are infinite, too.
        if logits.device.type == "cpu":
            logits.index_fill_(0, (~alive).nonzero().squeeze(1), 0.0)
        else:  # the same without waiting for the device
            logits.masked_fill_(~alive[:, None], 0.0)
    factor = torch.where(alive[:, None], weight / total, 0.0)
    return torch.where(alive, nll, torch.zeros_like(nll)), _Softmax(logits, factor, amounts)
