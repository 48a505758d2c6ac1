"""Next-token and Mixup cross-entropy of SFTMix from one pass over the logits.

SFTMix (Xiao et al., https://arxiv.org/abs/2410.05248) adds to next-token prediction (NTP) the loss of
mixed hidden states against mixed one-hot labels. For the hidden states z_c, z_u of a confident and an
unconfident example at one aligned response position, and a mixing weight lam,

    z~ = lam z_c + (1 - lam) z_u          y~ = lam onehot(y_c) + (1 - lam) onehot(y_u)
    mixup = cross-entropy(softmax(head(z~)), y~)

Two identities make it as cheap as NTP alone. Cross-entropy is linear in its target, so no one-hot
tensor is needed; and the head is affine, so head(z~) = lam head(z_c) + (1 - lam) head(z_u): the mixed
logits are a combination of logits that NTP computes anyway. With p, p~ the softmax outputs,

    d loss / d logits_c = g_ntp (p_c - onehot(y_c)) + g_mix lam       (p~ - y~)
    d loss / d logits_u = g_ntp (p_u - onehot(y_u)) + g_mix (1 - lam) (p~ - y~)

hence three matrix products in all (logits, d hidden, d weight), as for NTP. A final soft-cap
(cap tanh(logits / cap)) is applied after the mixing, since only raw logits are affine in z.

Axes: T rows that predict a response token, M mixed positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sftmix.kernels.pair_epilogue import pair_epilogue_torch

IGNORE_INDEX = -100

# Bytes of raw logits that live at once. Chunks are balanced, and a pair is never split between two.
WORKSPACE_BYTES = 1 << 30


class FusedLossOutput(NamedTuple):
    """What `fused_linear_mixup_cross_entropy` returns.

    loss: scalar, `ntp + mixup_weight * mixup`; differentiable in hidden, weight and bias.
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
) -> FusedLossOutput:
    """Returns the SFTMix loss of `logits = softcap(logit_scale * (hidden @ weight.T + bias))`.

    hidden: (T, D) rows that predict a token; bf16, fp16, fp32 or fp64.
    weight: (V, D), bias: (V,) or None; the linear head.
    labels: (T,) int64; rows with `ignore_index` contribute nothing to NTP.
    pairs: (M, 2) int64; the row of the confident and of the unconfident member of each mixed position.
        A row may occur once at most. A pair with an ignored member contributes nothing.
    lam: (M,) float32 in [0, 1]; share of the confident member.
    num_ntp_tokens, num_mixup_tokens: what the sums are divided by; default: this call's own counts.
        Pass the counts of the whole optimiser step to make the result independent of how it is cut up.
    backend: "torch" or "triton" (chunked: no (T, V) tensor lives beyond a chunk) or "reference" (materialised,
        plain autograd); default "torch".

    With no rows the loss is 0 with exact zero gradients and the graph attached, so that every rank of a
    sharded run takes part in the same collectives.
    Raises ValueError for an unknown backend or Triton without a GPU, RuntimeError for a weight that ZeRO-3 has not gathered.
    """
    if weight.numel() == 0:
        raise RuntimeError(
            "the head's weight is empty: ZeRO-3 holds it sharded. Call the loss inside the forward of the "
            "module that owns the weight, inside the engine's forward."
        )
    backend = backend or "torch"
    if num_ntp_tokens is None:
        num_ntp_tokens = (labels != ignore_index).sum()
    if num_mixup_tokens is None:
        num_mixup_tokens = _live_pairs(labels, pairs, ignore_index).sum()
    scales = _Scales(
        ntp=_one_over(num_ntp_tokens, hidden),
        mixup=_one_over(num_mixup_tokens, hidden),
        mixup_weight=float(mixup_weight),
        logit_scale=1.0 if logit_scale is None else float(logit_scale),
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
    )
    if backend == "reference":
        return _reference(hidden, weight, bias, labels, pairs, lam, scales)
    epilogue = _epilogue(backend)
    loss, ntp, mixup, nll = _FusedLinearMixupCrossEntropy.apply(hidden, weight, bias, labels, pairs, lam, scales, epilogue)
    return FusedLossOutput(loss, ntp, mixup, nll)


def _epilogue(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if backend == "torch":
        return pair_epilogue_torch
    if backend == "triton":
        # Imported when asked for: triton does not exist on every platform, and decides then whether to interpret.
        from sftmix.kernels.pair_epilogue_triton import pair_epilogue

        return pair_epilogue
    raise ValueError(f'unknown backend {backend!r}: expected "torch", "triton" or "reference"')


class _Scales(NamedTuple):
    ntp: Tensor  # 0-d, 1 / number of response tokens
    mixup: Tensor  # 0-d, 1 / number of mixed positions
    mixup_weight: float
    logit_scale: float
    logit_softcap: float | None
    ignore_index: int


def _one_over(count: float | Tensor, like: Tensor) -> Tensor:
    # clamp: a step without any such token has the sum 0, and 0 / 1 is its mean here, not NaN.
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(count, Tensor):
        return count.to(device=like.device, dtype=dtype).clamp(min=1).reciprocal()
    return like.new_full((), 1 / max(1.0, float(count)), dtype=dtype)  # filled on the device: nothing waits for a copy


def _live_pairs(labels: Tensor, pairs: Tensor, ignore_index: int) -> Tensor:
    return (labels[pairs] != ignore_index).all(dim=1)  # (M,)


def _softcap(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    scales: _Scales,
) -> FusedLossOutput:
    """The definition: hidden states are mixed, projected again, and differentiated by autograd."""
    accumulate = torch.promote_types(hidden.dtype, torch.float32)

    def log_probabilities(rows: Tensor) -> Tensor:
        raw = torch.nn.functional.linear(rows, weight, bias).to(accumulate)
        return torch.log_softmax(_softcap(scales.logit_scale * raw, scales.logit_softcap), dim=-1)

    valid = labels != scales.ignore_index
    safe = labels.clamp(min=0)
    nll = -log_probabilities(hidden).gather(1, safe[:, None]).squeeze(1) * valid
    ntp = nll.sum() * scales.ntp

    live = _live_pairs(labels, pairs, scales.ignore_index)
    lam = lam.to(accumulate)
    mixed = lam[:, None] * hidden[pairs[:, 0]].to(accumulate) + (1 - lam[:, None]) * hidden[pairs[:, 1]].to(accumulate)
    log_p = log_probabilities(mixed.to(hidden.dtype))
    to_confident = log_p.gather(1, safe[pairs[:, 0], None]).squeeze(1)
    to_unconfident = log_p.gather(1, safe[pairs[:, 1], None]).squeeze(1)
    mixup = (-(lam * to_confident + (1 - lam) * to_unconfident) * live).sum() * scales.mixup

    loss = ntp + scales.mixup_weight * mixup
    return FusedLossOutput(loss, ntp.detach(), mixup.detach(), nll.detach().float())


def pair_order(num_rows: int, pairs: Tensor) -> Tensor:
    """Returns (T,) int64: a permutation of the rows in which partners are neighbours (c0, u0, c1, u1, ...),
    followed by the rows without a partner in their own order. No device-to-host sync."""
    paired = pairs.reshape(-1)
    has_partner = torch.zeros(num_rows, dtype=torch.int8, device=pairs.device)
    has_partner[paired] = 1
    alone = torch.argsort(has_partner, stable=True)[: num_rows - paired.numel()]
    return torch.cat([paired, alone])


def balanced_chunks(num_rows: int, vocab_size: int, itemsize: int, workspace_bytes: int) -> list[tuple[int, int]]:
    """Returns [start, stop) row ranges of nearly equal, even length whose logits fit the workspace."""
    budget = max(2, workspace_bytes // (vocab_size * itemsize))
    num_chunks = max(1, -(-num_rows // budget))
    size = max(2, -(-num_rows // num_chunks))
    size += size % 2  # even, so that a pair of neighbours stays in one chunk
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _FusedLinearMixupCrossEntropy(torch.autograd.Function):
    """Chunked products with an epilogue between them. Gradients are formed in the forward, while a chunk's logits are
    there, and returned from `backward`, so that autograd (and ZeRO-3's hooks) see the weight's gradient once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, pairs, lam, scales, epilogue):  # type: ignore[no-untyped-def, override]
        num_rows, vocab_size = hidden.shape[0], weight.shape[0]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        want_any = want_hidden or want_weight or want_bias

        num_pairs = pairs.shape[0]
        order = pair_order(num_rows, pairs) if num_pairs else None
        rows = hidden if order is None else hidden.index_select(0, order)
        targets = labels if order is None else labels.index_select(0, order)

        token_nll = hidden.new_zeros(num_rows, dtype=accumulate)
        mixup_nll = hidden.new_zeros(num_pairs, dtype=accumulate)
        d_rows = torch.zeros_like(rows) if want_hidden else None
        d_weight = torch.zeros_like(weight, dtype=accumulate) if want_weight else None
        d_bias = hidden.new_zeros(vocab_size, dtype=accumulate) if want_bias else None

        # Weights of order one in the chunks; 1 / tokens, which float16 cannot hold, follows in float32 in `backward`.
        one = torch.ones_like(scales.ntp)
        # The torch epilogue works on a copy in float32 where the logits are not; the Triton one in registers.
        itemsize = hidden.element_size() if epilogue is not pair_epilogue_torch else torch.empty((), dtype=accumulate).element_size()
        for start, stop in balanced_chunks(num_rows, vocab_size, itemsize, WORKSPACE_BYTES):
            chunk = rows[start:stop]
            logits = torch.nn.functional.linear(chunk, weight, bias)
            first, last = min(start // 2, num_pairs), min(stop // 2, num_pairs)  # pairs of neighbours in this chunk
            token_nll[start:stop], mixup_nll[first:last] = epilogue(
                logits,
                targets[start:stop],
                lam[first:last],
                one,
                scales.mixup_weight * scales.mixup / scales.ntp,
                scales.logit_scale,
                scales.logit_softcap,
                scales.ignore_index,
                want_any,
            )
            d_logits = logits  # overwritten
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0, dtype=accumulate)
            if d_rows is not None:
                torch.mm(d_logits, weight, out=d_rows[start:stop])
            if d_weight is not None:
                d_weight += (d_logits.t() @ chunk).to(accumulate)

        d_hidden = d_rows
        if order is not None:
            token_nll = torch.zeros_like(token_nll).index_copy_(0, order, token_nll)
            if d_rows is not None:
                d_hidden = torch.empty_like(d_rows).index_copy_(0, order, d_rows)
        ntp = token_nll.sum() * scales.ntp
        mixup = mixup_nll.sum() * scales.mixup
        loss = ntp + scales.mixup_weight * mixup
        token_nll = token_nll.float()
        ctx.save_for_backward(d_hidden, d_weight, d_bias, scales.ntp)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(ntp, mixup, token_nll)
        return loss, ntp, mixup, token_nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, *_):  # type: ignore[no-untyped-def, override]
        *gradients, one_over_tokens = ctx.saved_tensors
        # In float32 until the end: a loss scale of 2**16 is infinite in float16. Cast here, since autograd would do so
        # without a word.
        factor = d_loss.to(one_over_tokens.dtype) * one_over_tokens
        scaled = [
            None if gradient is None else (gradient.to(factor.dtype) * factor).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)
