"""Triton version of `pair_epilogue.py` (see there for the mathematics): one program per pair of
logit rows.

Three log-sum-exps run online in one pass over V; a second pass reads the logits again and
overwrites them with scale * dz. The logits are read twice and written once, as a plain
cross-entropy kernel would.

Compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 in `tests/kernels/test_ahead_of_time.py`:
no spills.

Axes: N rows of the chunk, M pairs among them, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.triton_package import tl, triton

INTERPRETED = bool(triton.knobs.runtime.interpret)
# columns of V per tile: with 8 warps 128 registers and no spills on sm_90; wider tiles spill
MAX_BLOCK = 4096


def pair_epilogue(
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
    """Returns and overwrites what `pair_epilogue_torch` does, for the same arguments."""
    need_gpu(logits)
    num_rows, vocab_size = logits.shape
    num_pairs = lam.shape[0]
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    nll = torch.empty(num_rows, dtype=accumulate, device=logits.device)
    mixup = torch.empty(num_pairs, dtype=accumulate, device=logits.device)
    smoothed = torch.empty_like(nll) if label_smoothing else nll
    options = {
        **_options(logits, logit_scale, logit_softcap),
        "WANT_GRADIENT": want_gradient,
        "SMOOTHING": float(label_smoothing),
        "PER_ROW": ntp_weight.dim() == 1,
        "BY_PROBABILITY": by_probability,
    }
    weights = (ntp_weight.to(accumulate).contiguous(), mixup_weight.to(accumulate))
    scalars = (logits.stride(0), vocab_size, ignore_index)
    if num_pairs:
        _pair_kernel[(num_pairs,)](
            logits, labels, lam.to(accumulate), nll, mixup, smoothed, *weights, *scalars, **options
        )
    if num_rows > 2 * num_pairs:
        alone = (num_rows - 2 * num_pairs,)
        _row_kernel[alone](
            logits,
            labels,
            nll,
            nll,
            smoothed,
            weights[0],
            *scalars,
            2 * num_pairs,
            WANT_MATCH=False,
            **options,
        )
    return nll, mixup, smoothed


def row_nll(
    logits: Tensor,
    labels: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    nll: Tensor,
    match: Tensor,
    top_nll: Tensor,
) -> None:
    """Fills nll (N,) float32, match (N,) bool and top_nll (N,) float32 from raw logits (N, V), read
    once; as `row_nll_torch`."""
    need_gpu(logits)
    num_rows, vocab_size = logits.shape
    options = {
        **_options(logits, logit_scale, logit_softcap),
        "WANT_GRADIENT": False,
        "WANT_MATCH": True,
        "SMOOTHING": 0.0,
        "PER_ROW": False,
        "BY_PROBABILITY": False,
    }
    if num_rows:
        scalars = (logits.stride(0), vocab_size, ignore_index, 0)
        _row_kernel[(num_rows,)](
            logits, labels, nll, match.view(torch.int8), top_nll, nll, *scalars, **options
        )


def need_gpu(tensor: Tensor) -> None:
    """Raises ValueError if a kernel cannot run on the tensor."""
    if not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f'backend="triton" needs a GPU, and the tensors are on {tensor.device}. Use'
            ' backend="torch", or set TRITON_INTERPRET=1 before the start to interpret the kernels'
            " (for tests: it is slow)."
        )


def _options(logits: Tensor, logit_scale: float, logit_softcap: float | None) -> dict[str, object]:
    return {
        "SCALE": float(logit_scale),  # compile-time: one value per model, and exact in float64
        "CAP": None if logit_softcap is None else float(logit_softcap),
        "ACCUMULATE": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(logits.shape[1])),
        "num_warps": 8,
    }


@triton.jit
def _softcap(z, CAP: tl.constexpr):
    # CAP * tanh(z / CAP); written with exp because the interpreter has no tanh. exp overflows to
    # inf, and 2 / inf is 0.
    if CAP is None:
        return z
    else:
        return CAP * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * z / CAP)))


@triton.jit
def _d_softcap(capped, CAP: tl.constexpr):
    if CAP is None:
        return 1.0
    else:
        return 1.0 - (capped / CAP) * (capped / CAP)


@triton.jit
def _smoothed(hit, V, SMOOTHING: tl.constexpr, ACCUMULATE: tl.constexpr):
    if SMOOTHING > 0.0:
        smoothing = tl.full((), SMOOTHING, ACCUMULATE)
        return (1.0 - smoothing) * hit.to(ACCUMULATE) + smoothing / V
    else:
        return hit


@triton.jit
def _online(maximum, total, values):
    # Online softmax (https://arxiv.org/abs/1805.02867): running maximum, and the sum rescaled to
    # it.
    larger = tl.maximum(maximum, tl.max(values, axis=0))
    return larger, total * tl.exp(maximum - larger) + tl.sum(tl.exp(values - larger), axis=0)


@triton.jit
def _pair_kernel(
    logits_ptr,
    labels_ptr,
    lam_ptr,
    nll_ptr,
    mixup_ptr,
    smoothed_ptr,
    ntp_weight_ptr,
    mixup_weight_ptr,
    row_stride,
    V,
    ignore_index,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_PROBABILITY: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: row * row_stride overflows int32 once N * V > 2**31
    pair = tl.program_id(0).to(tl.int64)
    c_ptr = logits_ptr + 2 * pair * row_stride
    u_ptr = c_ptr + row_stride
    lam = tl.load(lam_ptr + pair)
    rest = 1.0 - lam
    y_c = tl.load(labels_ptr + 2 * pair)
    y_u = tl.load(labels_ptr + 2 * pair + 1)
    has_c = y_c != ignore_index
    has_u = y_u != ignore_index

    minus_inf = tl.full((), -float("inf"), ACCUMULATE)
    zero = tl.full((), 0.0, ACCUMULATE)
    # Finite: a first tile of logits that are all -inf (masked-out tokens) would give -inf - -inf.
    lowest = tl.full((), -3.0e38, ACCUMULATE)
    m_c, m_u, m_m = lowest, lowest, lowest
    s_c, s_u, s_m = zero, zero, zero
    t_c, t_u = zero, zero  # of the capped logits, if labels are smoothed
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        # Padding is 0 and masked to -inf after the mix: lam * -inf + 0 * -inf would be NaN.
        z_c = tl.load(c_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
        z_u = tl.load(u_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
        mixed = _softcap(lam * z_c + rest * z_u, CAP)  # mixing comes before the soft-cap
        m_c, s_c = _online(m_c, s_c, tl.where(inside, _softcap(z_c, CAP), minus_inf))
        m_u, s_u = _online(m_u, s_u, tl.where(inside, _softcap(z_u, CAP), minus_inf))
        m_m, s_m = _online(m_m, s_m, tl.where(inside, mixed, minus_inf))
        if SMOOTHING > 0.0:
            t_c += tl.sum(tl.where(inside, _softcap(z_c, CAP), zero), axis=0)
            t_u += tl.sum(tl.where(inside, _softcap(z_u, CAP), zero), axis=0)

    # The logits at the labels, read before the second pass overwrites them.
    at_c = tl.where(has_c, y_c, 0)
    at_u = tl.where(has_u, y_u, 0)
    cc = tl.load(c_ptr + at_c).to(ACCUMULATE) * SCALE
    cu = tl.load(c_ptr + at_u).to(ACCUMULATE) * SCALE
    uc = tl.load(u_ptr + at_c).to(ACCUMULATE) * SCALE
    uu = tl.load(u_ptr + at_u).to(ACCUMULATE) * SCALE
    mixed_c = _softcap(lam * cc + rest * uc, CAP)
    mixed_u = _softcap(lam * cu + rest * uu, CAP)
    # Subtract the maximum from the logits first: large logits would cancel.
    nll_c = tl.log(s_c) - (_softcap(cc, CAP) - m_c)
    nll_u = tl.log(s_u) - (_softcap(uu, CAP) - m_u)
    nll_m = tl.log(s_m) - (lam * (mixed_c - m_m) + rest * (mixed_u - m_m))
    tl.store(nll_ptr + 2 * pair, tl.where(has_c, nll_c, zero))
    tl.store(nll_ptr + 2 * pair + 1, tl.where(has_u, nll_u, zero))
    tl.store(mixup_ptr + pair, tl.where(has_c & has_u, nll_m, zero))
    if SMOOTHING > 0.0:
        even_c = tl.log(s_c) - (t_c / V - m_c)
        even_u = tl.log(s_u) - (t_u / V - m_u)
        tl.store(smoothed_ptr + 2 * pair, tl.where(has_c, even_c, zero))
        tl.store(smoothed_ptr + 2 * pair + 1, tl.where(has_u, even_u, zero))

    if WANT_GRADIENT:
        # every warp has read the logits at the labels before any overwrites them
        tl.debug_barrier()
        w_c = tl.load(ntp_weight_ptr + (2 * pair if PER_ROW else 0))
        w_u = tl.load(ntp_weight_ptr + (2 * pair + 1 if PER_ROW else 0))
        if BY_PROBABILITY:
            w_c *= tl.exp(-nll_c)
            w_u *= tl.exp(-nll_u)
        w_mix = tl.load(mixup_weight_ptr)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < V
            z_c = tl.load(c_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
            z_u = tl.load(u_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
            l_c = _softcap(z_c, CAP)
            l_u = _softcap(z_u, CAP)
            l_m = _softcap(lam * z_c + rest * z_u, CAP)
            hit_c = tl.where(column == y_c, 1.0, 0.0)
            hit_u = tl.where(column == y_u, 1.0, 0.0)
            y_of_c = _smoothed(hit_c, V, SMOOTHING, ACCUMULATE)
            y_of_u = _smoothed(hit_u, V, SMOOTHING, ACCUMULATE)
            g_c = w_c * (tl.exp(l_c - m_c) / s_c - y_of_c) * _d_softcap(l_c, CAP)
            g_u = w_u * (tl.exp(l_u - m_u) / s_u - y_of_u) * _d_softcap(l_u, CAP)
            g_m = (
                w_mix
                * (tl.exp(l_m - m_m) / s_m - lam * hit_c - rest * hit_u)
                * _d_softcap(l_m, CAP)
            )
            # Select instead of multiplying by 0: an ignored row must give exact zeros even for
            # infinite logits.
            g_m = tl.where(has_c & has_u, g_m, zero)
            d_c = (tl.where(has_c, g_c, zero) + lam * g_m) * SCALE
            d_u = (tl.where(has_u, g_u, zero) + rest * g_m) * SCALE
            tl.store(c_ptr + column, d_c.to(c_ptr.dtype.element_ty), mask=inside)
            tl.store(u_ptr + column, d_u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_kernel(
    logits_ptr,
    labels_ptr,
    nll_ptr,
    match_ptr,
    second_ptr,  # smoothed losses; or with WANT_MATCH those of the likeliest tokens
    ntp_weight_ptr,
    row_stride,
    V,
    ignore_index,
    first_row,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    WANT_MATCH: tl.constexpr,
    SMOOTHING: tl.constexpr,
    PER_ROW: tl.constexpr,
    BY_PROBABILITY: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = first_row + tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * row_stride
    y = tl.load(labels_ptr + row)
    has_label = y != ignore_index
    minus_inf = tl.full((), -float("inf"), ACCUMULATE)
    zero = tl.full((), 0.0, ACCUMULATE)
    m = tl.full((), -3.0e38, ACCUMULATE)  # finite, as above
    s = zero
    t = zero
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        z = tl.load(z_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
        m, s = _online(m, s, tl.where(inside, _softcap(z, CAP), minus_inf))
        if SMOOTHING > 0.0:
            t += tl.sum(tl.where(inside, _softcap(z, CAP), zero), axis=0)
    at_label = _softcap(tl.load(z_ptr + tl.where(has_label, y, 0)).to(ACCUMULATE) * SCALE, CAP)
    tl.store(nll_ptr + row, tl.where(has_label, tl.log(s) - (at_label - m), zero))
    if SMOOTHING > 0.0:
        tl.store(second_ptr + row, tl.where(has_label, tl.log(s) - (t / V - m), zero))
    if WANT_MATCH:
        tl.store(match_ptr + row, (has_label & (at_label >= m)).to(tl.int8))
        tl.store(second_ptr + row, tl.where(has_label, tl.log(s), zero))
    if WANT_GRADIENT:
        # every warp has read the logits at the labels before any overwrites them
        tl.debug_barrier()
        w_ntp = tl.load(ntp_weight_ptr + (row if PER_ROW else 0))
        if BY_PROBABILITY:
            w_ntp *= tl.exp(at_label - m) / s
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < V
            z = tl.load(z_ptr + column, mask=inside, other=0.0).to(ACCUMULATE) * SCALE
            capped = _softcap(z, CAP)
            hit = tl.where(column == y, 1.0, 0.0)
            target = _smoothed(hit, V, SMOOTHING, ACCUMULATE)
            g = w_ntp * (tl.exp(capped - m) / s - target) * _d_softcap(capped, CAP) * SCALE
            tl.store(
                z_ptr + column, tl.where(has_label, g, zero).to(z_ptr.dtype.element_ty), mask=inside
            )
