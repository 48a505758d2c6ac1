"""The losses and logit gradients of a chunk of raw logits, in place: definition and plain PyTorch.

Rows 2i and 2i + 1 of the chunk are the confident and the unconfident member of pair i; the rows
after the pairs have no partner. With z the scaled raw logits, s the soft-cap (identity where there
is none), y the labels,

    l_c = s(z_c)    l_u = s(z_u)    l_m = s(lam z_c + (1 - lam) z_u)
    nll_r = logsumexp(l_r) - l_r[y_r]
    mixup = logsumexp(l_m) - lam l_m[y_c] - (1 - lam) l_m[y_u]
    g_r = w_ntp s'(z_r) (softmax(l_r) - onehot(y_r))
    g_m = w_mix s'(z_m) (softmax(l_m) - y~)
    dz_c = g_c + lam g_m                                      dz_u = g_u + (1 - lam) g_m

All versions have one signature: `pair_epilogue_reference` (autograd), `pair_epilogue_torch` (in
place, any device), and `pair_epilogue` in `pair_epilogue_triton.py`.

Axes: N rows of the chunk, M pairs among them, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sftmix.kernels.backends import softcapped_with_derivative

CACHE_BYTES = 1 << 20  # of logits in one piece on a CPU; measured in benchmarks/loss_kernels.py


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
    label_smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, by autograd in plain PyTorch. Arguments and results as `pair_epilogue`."""
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    raw = logits.detach().to(accumulate).requires_grad_()
    num_pairs = lam.shape[0]
    share = lam.to(accumulate)[:, None]

    def log_probabilities(scaled: Tensor) -> Tensor:
        capped = (
            scaled if logit_softcap is None else logit_softcap * torch.tanh(scaled / logit_softcap)
        )
        return torch.log_softmax(capped, dim=1)

    valid = labels != ignore_index
    safe = labels.clamp(min=0)[:, None]
    with torch.enable_grad():
        scaled = raw * logit_scale
        log_p_rows = log_probabilities(scaled)
        nll = torch.where(valid, -log_p_rows.gather(1, safe).squeeze(1), 0.0)
        smoothed = torch.where(valid, -log_p_rows.mean(dim=1), 0.0) if label_smoothing else nll
        confident, unconfident = scaled[0 : 2 * num_pairs : 2], scaled[1 : 2 * num_pairs : 2]
        log_p = log_probabilities(share * confident + (1 - share) * unconfident)
        targets = safe[: 2 * num_pairs]
        mixup = -(
            share * log_p.gather(1, targets[0::2]) + (1 - share) * log_p.gather(1, targets[1::2])
        ).squeeze(1)
        mixup = torch.where(valid[: 2 * num_pairs].view(-1, 2).all(dim=1), mixup, 0.0)
        objective = (1 - label_smoothing) * nll + label_smoothing * smoothed
        weight = ntp_weight * torch.exp(-nll.detach()) if by_probability else ntp_weight
        loss = (objective * weight).sum() + (mixup * mixup_weight).sum()
    if want_gradient:
        (gradient,) = torch.autograd.grad(loss, raw)
        logits.copy_(gradient.to(logits.dtype))
    return nll.detach(), mixup.detach(), smoothed.detach()


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
    label_smoothing: float = 0.0,
    by_probability: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the (N,) NTP and (M,) Mixup losses in nats, and the (N,) mean of -log p over the
    vocabulary; overwrites the raw logits with the gradient of

        sum of ntp_weight ((1 - label_smoothing) NTP + label_smoothing mean) + mixup_weight Mixup

    logits: (N, V), contiguous rows; labels: (N,) int64; lam: (M,), M <= N // 2, share of row 2i in
    pair i. ntp_weight: 0-d or (N,) tensor, mixup_weight: 0-d tensor; they stay on the device.
    by_probability: a row's weight is multiplied by the probability of its label (DFT). Losses are
    float32 (float64 for float64 logits) and are not multiplied by weights. Without label smoothing
    the third result is the first. A row with an ignored label gives 0 and exact zeros,
    and so does the mixed part of a pair with one. `want_gradient=False`: the logits' content is
    undefined afterwards.
    """
    rows = _Rows.of(
        logits, labels, ntp_weight, logit_scale, logit_softcap, ignore_index, label_smoothing
    )
    pairs = _Pairs.of(rows, lam, mixup_weight, logit_scale, logit_softcap) if lam.shape[0] else None
    has_dead = logits.device.type != "cpu" or not bool(rows.alive.all())
    for piece in pieces_in_cache(logits, rows.maximum.dtype):
        # the same tensor where it has this dtype already
        raw = logits[piece].to(rows.maximum.dtype)
        if logit_scale != 1.0:
            raw *= logit_scale
        mixed = None
        if pairs is not None and piece.start < 2 * len(lam):
            # The mixed part comes first, because the NTP part overwrites the raw logits.
            mixed = pairs.mix(
                raw,
                slice(piece.start // 2, min(piece.stop // 2, len(lam))),
                logit_softcap,
                has_dead,
                want_gradient,
            )
        torch.amax(raw, dim=1, keepdim=True, out=rows.maximum[piece])
        d_softcap = _exponentials_in_place(
            raw,
            rows.maximum[piece],
            rows.total[piece],
            logit_softcap,
            want_gradient,
            mean=rows.mean[piece] if label_smoothing else None,
        )
        if want_gradient:
            if by_probability:
                rows.weigh_by_probability(piece)
            raw.mul_(rows.weight[piece] / rows.total[piece])
            if label_smoothing:
                raw.sub_(rows.weight[piece] * (label_smoothing / raw.shape[1]))
            if d_softcap is not None:
                raw.mul_(d_softcap)
            if has_dead:
                _clear(raw, rows.alive[piece])
            raw.scatter_add_(1, rows.label[piece], rows.at_label_gradient[piece])
            if mixed is not None:
                mixed.add_to(raw)
            if logit_scale != 1.0:
                raw *= logit_scale
            if raw.data_ptr() != logits[piece].data_ptr():
                logits[piece].copy_(raw)
    nll = rows.losses()
    mixup = logits.new_zeros(0, dtype=rows.maximum.dtype) if pairs is None else pairs.losses()
    return nll, mixup, rows.smoothed() if label_smoothing else nll


def pieces_in_cache(logits: Tensor, accumulate: torch.dtype) -> Iterator[slice]:
    """Yields ranges of whole pairs of rows. The epilogue makes about twelve passes over the logits.
    On a CPU a piece fits into the cache; elsewhere all rows are one piece."""
    num_rows, vocab_size = logits.shape
    size = max(1, num_rows)
    if logits.device.type == "cpu":
        size = max(2, CACHE_BYTES // (vocab_size * accumulate.itemsize) // 2 * 2)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


@dataclass
class _Rows:
    """Per-row values of a chunk, (N, 1) each: those known before the softmax, and its maximum and
    total, which are filled piece by piece. Operations on single logits run here once per chunk,
    because one call per piece would cost more than its work.

    at_label: the (capped) logit at the label. at_label_gradient: what is added to the gradient
    there. mean: of the (capped) logits, if labels are smoothed.
    """

    logits: Tensor
    label: Tensor
    alive: Tensor
    at_label: Tensor
    at_label_gradient: Tensor
    weight: Tensor
    maximum: Tensor
    total: Tensor
    mean: Tensor

    @classmethod
    def of(
        cls,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor,
        scale: float,
        softcap: float | None,
        ignore_index: int,
        label_smoothing: float,
    ) -> _Rows:
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        alive = (labels != ignore_index)[:, None]
        label = labels.clamp(min=0)[:, None]
        at_label, slope = softcapped_with_derivative(
            logits.gather(1, label).to(accumulate) * scale, softcap
        )
        weight = torch.where(alive, weight.to(accumulate).reshape(-1, 1), 0.0)
        return cls(
            logits,
            label,
            alive,
            at_label,
            -(1 - label_smoothing) * weight * slope,
            weight,
            *(torch.empty_like(at_label) for _ in range(3)),
        )

    def weigh_by_probability(self, piece: slice) -> None:
        p = (self.at_label[piece] - self.maximum[piece]).exp() / self.total[piece]
        for weight in (self.weight[piece], self.at_label_gradient[piece]):
            weight.copy_(torch.where(self.alive[piece], weight * p, 0.0))

    def losses(self) -> Tensor:
        # Subtract the maximum from the logits first: large logits would cancel.
        return torch.where(
            self.alive, self.total.log() - (self.at_label - self.maximum), 0.0
        ).squeeze(1)

    def smoothed(self) -> Tensor:
        return torch.where(self.alive, self.total.log() - (self.mean - self.maximum), 0.0).squeeze(
            1
        )


@dataclass
class _Pairs:
    """The same of all pairs. share: (M, 2), of the confident and the unconfident member. labels,
    at_label: (M, 2), both members' labels and the mixed logits there. d_confident, d_unconfident:
    (M, 2), what is added to a member's gradient at them."""

    share: Tensor
    labels: Tensor
    alive: Tensor
    at_label: Tensor
    d_confident: Tensor
    d_unconfident: Tensor
    weight: Tensor
    maximum: Tensor
    total: Tensor

    @classmethod
    def of(
        cls, rows: _Rows, lam: Tensor, weight: Tensor, scale: float, softcap: float | None
    ) -> _Pairs:
        accumulate, paired = rows.maximum.dtype, 2 * len(lam)
        share = torch.stack([lam.to(accumulate), 1 - lam.to(accumulate)], dim=1)
        labels = rows.label[:paired].view(-1, 2)
        alive = rows.alive[:paired].view(-1, 2).all(dim=1, keepdim=True)
        confident, unconfident = (
            rows.logits[member:paired:2].gather(1, labels).to(accumulate) * scale
            for member in (0, 1)
        )
        at_label, slope = softcapped_with_derivative(
            share[:, :1] * confident + share[:, 1:] * unconfident, softcap
        )
        weight = torch.where(alive, weight.to(accumulate), 0.0)
        gradient = -weight * share * slope
        empty = torch.empty_like(weight)
        return cls(
            share,
            labels,
            alive,
            at_label,
            share[:, :1] * gradient,
            share[:, 1:] * gradient,
            weight,
            empty,
            torch.empty_like(empty),
        )

    def mix(
        self, raw: Tensor, pairs: slice, softcap: float | None, has_dead: bool, want_gradient: bool
    ) -> _Mixed | None:
        """Takes the softmax of the mixed logits of a piece's first rows; returns its part of the
        gradient."""
        confident, unconfident = (
            raw[0 : 2 * (pairs.stop - pairs.start) : 2],
            raw[1 : 2 * (pairs.stop - pairs.start) : 2],
        )
        share, rest = self.share[pairs, :1], self.share[pairs, 1:]
        maximum, total = self.maximum[pairs], self.total[pairs]
        # lerp needs one pass instead of two, but it takes a difference, which is NaN if both are
        # -inf.
        is_cpu = raw.device.type == "cpu"
        mixed = (
            torch.lerp(unconfident, confident, share)
            if is_cpu
            else (confident * share).addcmul_(unconfident, rest)
        )
        torch.amax(mixed, dim=1, keepdim=True, out=maximum)
        if is_cpu and math.isnan(float(maximum.sum())):
            mixed = (confident * share).addcmul_(unconfident, rest)
            torch.amax(mixed, dim=1, keepdim=True, out=maximum)
        d_softcap = _exponentials_in_place(mixed, maximum, total, softcap, want_gradient)
        if not want_gradient:
            return None
        if d_softcap is not None:
            mixed.mul_(d_softcap)
        factor = self.weight[pairs] / total
        if has_dead:
            _clear(mixed, self.alive[pairs])
            factor = torch.where(self.alive[pairs], factor, 0.0)
        return _Mixed(
            mixed,
            (share * factor, rest * factor),
            self.labels[pairs],
            (self.d_confident[pairs], self.d_unconfident[pairs]),
        )

    def losses(self) -> Tensor:
        shifted = (self.share * (self.at_label - self.maximum)).sum(dim=1, keepdim=True)
        return torch.where(self.alive, self.total.log() - shifted, 0.0).squeeze(1)


class _Mixed(NamedTuple):
    """The mixed gradient of a piece, before it is added to the members: factor * exponentials, plus
    terms at the labels."""

    exponentials: Tensor
    factors: tuple[Tensor, Tensor]
    labels: Tensor
    at_labels: tuple[Tensor, Tensor]

    def add_to(self, raw: Tensor) -> None:
        for member in (0, 1):
            rows = raw[member : 2 * len(self.labels) : 2]
            rows.addcmul_(self.exponentials, self.factors[member])
            rows.scatter_add_(1, self.labels, self.at_labels[member])


def _exponentials_in_place(
    logits: Tensor,
    maximum: Tensor,
    total: Tensor,
    softcap: float | None,
    want_gradient: bool,
    *,
    mean: Tensor | None = None,
) -> Tensor | None:
    """Overwrites (n, V) logits, whose maximum (n, 1) is given, by exp of the capped logits less
    their maximum; stores that in `maximum`, the sum in `total` and the capped logits' mean in
    `mean`. exp is computed once, for both loss and gradient. Returns the soft-cap's derivative."""
    d_softcap: Tensor | None = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        d_softcap = 1 - logits.square() if want_gradient else None
        logits.mul_(softcap)
        maximum.div_(softcap).tanh_().mul_(softcap)
    if mean is not None:
        torch.mean(logits, dim=1, keepdim=True, out=mean)
    torch.sum(logits.sub_(maximum).exp_(), dim=1, keepdim=True, out=total)
    return d_softcap


def _clear(rows: Tensor, alive: Tensor) -> None:
    # Fill instead of multiplying by 0: an ignored row must give exact zeros even for infinite
    # logits.
    if rows.device.type == "cpu":
        rows.index_fill_(0, (~alive).squeeze(1).nonzero().squeeze(1), 0.0)
    else:  # the same without waiting for the device
        rows.masked_fill_(~alive, 0.0)
