"""Next-token and Mixup cross-entropy of SFTMix from one pass over the logits.

SFTMix (Xiao et al., https://arxiv.org/abs/2410.05248) adds to next-token prediction (NTP) the loss
of mixed hidden states against mixed one-hot labels. For the hidden states z_c, z_u of a confident
and an unconfident example at one aligned response position, and a mixing weight lam,

    z~ = lam z_c + (1 - lam) z_u          y~ = lam onehot(y_c) + (1 - lam) onehot(y_u)
    mixup = cross-entropy(softmax(head(z~)), y~)

Two identities make it as cheap as NTP alone. Cross-entropy is linear in its target, so no one-hot
tensor is needed; and the head is affine, so head(z~) = lam head(z_c) + (1 - lam) head(z_u): the
mixed logits are a combination of logits that NTP computes anyway. With p, p~ the softmax outputs,

    d loss / d logits_c = g_ntp (p_c - onehot(y_c)) + g_mix lam       (p~ - y~)
    d loss / d logits_u = g_ntp (p_u - onehot(y_u)) + g_mix (1 - lam) (p~ - y~)

hence three matrix products in all (logits, d hidden, d weight), as for NTP. A final soft-cap (cap
tanh(logits / cap)) is applied after mixing, because only raw logits are affine in z.

Other objectives for next tokens take the place of NTP at the same price: weights of tokens
(`token_weights.py`) scale a row's gradient, and label smoothing, (1 - eps) NTP + eps mean over V of
-log p (https://arxiv.org/abs/1512.00567), changes its target.

Axes: T rows that predict a response token, M mixed positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sftmix.kernels.backends import choose_backend, softcapped
from sftmix.kernels.chunked_linear_mixup import chunked_linear_mixup
from sftmix.kernels.token_weights import WEIGHTINGS, weights_by_definition

IGNORE_INDEX = -100


class FusedLossOutput(NamedTuple):
    """What `fused_linear_mixup_cross_entropy` returns.

    loss: scalar, `ntp_weight * ntp + mixup_weight * mixup`, where tokens are weighted or labels
    smoothed with that objective in the place of ntp; differentiable, once, in hidden, weight, bias.
    ntp: scalar, detached; mean negative log-likelihood in nats per response token.
    mixup: scalar, detached; mean Mixup cross-entropy in nats per mixed position.
    token_nll: (T,) float32, detached; NTP loss of each row in nats, 0 where the label is ignored.
    """

    loss: Tensor
    ntp: Tensor
    mixup: Tensor
    token_nll: Tensor


def fused_linear_mixup_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    mixup_weight: float = 0.2,
    bias: Tensor | None = None,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    num_ntp_tokens: float | Tensor | None = None,
    num_mixup_tokens: float | Tensor | None = None,
    backend: str | None = None,
    ignore_index: int = IGNORE_INDEX,
    ntp_weight: float = 1.0,
    weighting: str = "none",
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    row_weights: Tensor | None = None,
) -> FusedLossOutput:
    """Returns the SFTMix loss of `logits = softcap(logit_scale * (hidden @ weight.T + bias))`.

    hidden: (T, D) rows that predict a token; bf16, fp16, fp32 or fp64. Leave out rows without a
    label: they cost as much as the others. weight: (V, D), bias: (V,) or None; the linear head. All
    in the dtype of hidden, or under autocast. labels: (T,) int64; rows with `ignore_index`
    contribute nothing to NTP. pairs: (M, 2) int64; the row of the confident and of the unconfident
    member of each mixed position.
        Each row occurs at most once. A pair with an ignored member contributes nothing.
    lam: (M,) float32 in [0, 1]; share of the confident member.
    num_ntp_tokens, num_mixup_tokens: what the sums are divided by; default: this call's own counts.
        Pass the counts of the whole optimiser step to make the result independent of how the step
        is divided.
    backend: "triton" or "torch" (chunked: no (T, V) tensor lives beyond a chunk) or "reference"
    (materialised,
        plain autograd); default "triton" for tensors on a GPU, else "torch". An explicit backend is
        never replaced by another.
    ntp_weight: factor of the next-token part; 0 leaves Mixup alone. weighting, alpha: of tokens, as
    `token_weights.py` lists them; weights carry no gradient, and the sum is divided by the number
    of tokens, not by the weights' sum. label_smoothing: in [0, 1). row_weights: (T,) more factors
    of the rows' next-token losses, without a gradient; float32, or float64 for float64 tensors.

    Without rows the loss is 0, the gradients are exact zeros and the graph is attached, so that
    every rank of a sharded run takes part in the same collectives. The call does not synchronise
    with the device. Raises ValueError for inconsistent arguments, an unknown backend, or Triton
    without a GPU, and RuntimeError for a weight that ZeRO-3 has not gathered. On a GPU a label
    outside the vocabulary or a row in two pairs fails as a device-side assertion.
    """
    hidden, weight, bias = under_autocast(hidden, weight, bias)
    check_arguments(hidden, weight, labels, pairs, lam, bias, row_weights)
    backend = choose_backend(backend, hidden)
    labels = labels.to(torch.int64)
    if num_ntp_tokens is None:
        num_ntp_tokens = (labels != ignore_index).sum()
    if num_mixup_tokens is None:
        num_mixup_tokens = _live_pairs(labels, pairs, ignore_index).sum()
    scales = _Scales(
        ntp=_one_over(num_ntp_tokens, hidden),
        mixup=_one_over(num_mixup_tokens, hidden),
        mixup_weight=float(mixup_weight),
        logit_scale=1.0 if logit_scale is None else float(logit_scale),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        ignore_index=ignore_index,
        ntp_weight=float(ntp_weight),
        weighting=weighting,
        alpha=float(alpha),
        label_smoothing=float(label_smoothing),
    )
    if weighting not in WEIGHTINGS or not 0 <= label_smoothing < 1:
        raise ValueError(
            f"weighting is {weighting!r} and label_smoothing {label_smoothing}, expected one of"
            f" {', '.join(WEIGHTINGS)} and a number in [0, 1)"
        )
    if backend == "reference":
        return _reference(hidden, weight, bias, labels, pairs, lam, row_weights, scales)
    # The forward computes the gradients, so it must know which ones are needed.
    want = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (hidden, weight, bias)
    ]
    loss, ntp, mixup, nll, *_ = chunked_linear_mixup(
        hidden, weight, bias, labels, pairs, lam, row_weights, *scales, backend, *want
    )
    return FusedLossOutput(loss, ntp.detach(), mixup.detach(), nll.detach())


class _Scales(NamedTuple):
    ntp: Tensor  # 0-d, 1 / number of response tokens
    mixup: Tensor  # 0-d, 1 / number of mixed positions
    mixup_weight: float
    logit_scale: float
    logit_softcap: float | None
    ignore_index: int
    ntp_weight: float
    weighting: str
    alpha: float
    label_smoothing: float


def under_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts the three as autocast would for a linear layer; autocast does not act inside custom
    operators."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    pairs: Tensor | None = None,
    lam: Tensor | None = None,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> None:
    """Raises RuntimeError for a weight that ZeRO-3 has not gathered, ValueError for wrong shapes or
    dtypes."""
    if weight.numel() == 0:
        raise RuntimeError(
            "the head's weight is empty: ZeRO-3 holds it sharded. Call the loss inside the forward"
            " of the module that owns the weight, inside the engine's forward."
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, expected (T,"
            " D) and (V, D)"
        )
    expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("labels", labels, (hidden.shape[0],)),
        ("bias", bias, (weight.shape[0],)),
        ("pairs", pairs, (0 if lam is None else lam.shape[0], 2)),
        ("row_weights", row_weights, (hidden.shape[0],)),
    ]
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} to fit the other"
                " arguments"
            )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and hidden is {hidden.dtype}: cast one of them, or use"
                " autocast"
            )


def _one_over(count: float | Tensor, like: Tensor) -> Tensor:
    # clamp: a step without any such token has the sum 0, and 0 / 1 is its mean here, not NaN.
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(count, Tensor):
        return count.to(device=like.device, dtype=dtype).clamp(min=1).reciprocal()
    # filled on the device: nothing waits for a copy
    return like.new_full((), 1 / max(1.0, float(count)), dtype=dtype)


def _live_pairs(labels: Tensor, pairs: Tensor, ignore_index: int) -> Tensor:
    return (labels[pairs] != ignore_index).all(dim=1)  # (M,)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    row_weights: Tensor | None,
    scales: _Scales,
) -> FusedLossOutput:
    """The definition: mix hidden states, project them, and differentiate by autograd."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)

    def log_probabilities(rows: Tensor) -> Tensor:
        raw = torch.nn.functional.linear(rows, weight, bias).to(accumulate)
        return torch.log_softmax(softcapped(scales.logit_scale * raw, scales.logit_softcap), dim=-1)

    valid = labels != scales.ignore_index
    safe = labels.clamp(min=0)
    log_p = log_probabilities(hidden)
    nll = -log_p.gather(1, safe[:, None]).squeeze(1) * valid
    ntp = nll.sum() * scales.ntp
    weights = weights_by_definition(scales.weighting, scales.alpha, log_p.detach(), safe)
    if row_weights is not None:
        weights = weights * row_weights
    smoothed = -log_p.mean(dim=1) * valid if scales.label_smoothing else nll
    objective = (weights * torch.lerp(nll, smoothed, scales.label_smoothing)).sum() * scales.ntp

    live = _live_pairs(labels, pairs, scales.ignore_index)
    lam = lam.to(accumulate)
    mixed = lam[:, None] * hidden[pairs[:, 0]].to(accumulate) + (1 - lam[:, None]) * hidden[
        pairs[:, 1]
    ].to(accumulate)
    log_p = log_probabilities(mixed.to(hidden.dtype))
    to_confident = log_p.gather(1, safe[pairs[:, 0], None]).squeeze(1)
    to_unconfident = log_p.gather(1, safe[pairs[:, 1], None]).squeeze(1)
    mixup = (-(lam * to_confident + (1 - lam) * to_unconfident) * live).sum() * scales.mixup

    loss = scales.ntp_weight * objective + scales.mixup_weight * mixup
    return FusedLossOutput(loss, ntp.detach(), mixup.detach(), nll.detach().float())
