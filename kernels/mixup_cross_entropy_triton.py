"""Triton version of `mixup_cross_entropy.py` (see there for the mathematics): one program per pair.

Forward: one online log-sum-exp pass over V, which keeps the maximum and the sum of each pair.
Backward: the logits are read once more and the gradients written to new tensors, so that a graph
can be retained. Both are custom operators, which `torch.compile` does not look into. A second
derivative raises an error.

Compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 in `tests/kernels/test_ahead_of_time.py`:
no spills.

Axes: M pairs, V vocabulary.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from sftmix.kernels.pair_epilogue_triton import _d_softcap, _online, _softcap, need_gpu
from sftmix.kernels.triton_package import tl, triton

MAX_BLOCK = 4096  # columns of V per tile, for 8 warps
LOWEST = tl.constexpr(-3.0e38)  # below every logit but -inf


@torch.library.custom_op("sftmix::mixup_forward", mutates_args=())
def mixup_forward(
    confident: Tensor,
    unconfident: Tensor | None,
    labels: Tensor,
    lam: Tensor,
    scale: float,
    cap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (M,) losses in nats, and the (M,) maximum and sum of exponentials over V that the
    backward needs.

    Arguments as `mixup_cross_entropy`, already checked. A label outside [0, V) gives NaN; no memory
    outside is read.
    """
    need_gpu(confident)
    loss, maximum, total = _forward_outputs(
        confident, unconfident, labels, lam, scale, cap, ignore_index
    )
    arguments, options = _common(confident, unconfident, labels, lam, scale, cap, ignore_index)
    if confident.shape[0]:
        _forward_kernel[(confident.shape[0],)](*arguments, loss, maximum, total, **options)
    return loss, maximum, total


@mixup_forward.register_fake
def _forward_outputs(confident, unconfident, labels, lam, scale, cap, ignore_index):
    accumulate = torch.promote_types(confident.dtype, torch.float32)
    return tuple(confident.new_empty(confident.shape[0], dtype=accumulate) for _ in range(3))


@torch.library.custom_op("sftmix::mixup_backward", mutates_args=())
def mixup_backward(
    confident: Tensor,
    unconfident: Tensor | None,
    labels: Tensor,
    lam: Tensor,
    scale: float,
    cap: float | None,
    ignore_index: int,
    maximum: Tensor,
    total: Tensor,
    d_loss: Tensor,
    want_confident: bool,
    want_unconfident: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients in both logits, (M, V) in their dtype; (0, V), unwritten, for one that
    is not wanted.

    maximum, total: from `mixup_forward`; d_loss: (M,), the upstream gradient, with any strides.
    """
    need_gpu(confident)
    d_confident, d_unconfident = _backward_outputs(
        confident,
        unconfident,
        labels,
        lam,
        scale,
        cap,
        ignore_index,
        maximum,
        total,
        d_loss,
        want_confident,
        want_unconfident,
    )
    arguments, options = _common(confident, unconfident, labels, lam, scale, cap, ignore_index)
    if confident.shape[0]:
        outputs = (
            d_confident if want_confident else None,
            d_unconfident if want_unconfident else None,
        )
        # contiguous: the upstream gradient of a sum is one number, expanded.
        _backward_kernel[(confident.shape[0],)](
            *arguments, maximum, total, d_loss.contiguous(), *outputs, **options
        )
    return d_confident, d_unconfident


@mixup_backward.register_fake
def _backward_outputs(
    confident,
    unconfident,
    labels,
    lam,
    scale,
    cap,
    ignore_index,
    maximum,
    total,
    d_loss,
    want_confident,
    want_unconfident,
):
    num_pairs, vocab_size = confident.shape
    return tuple(
        confident.new_empty(num_pairs if wanted else 0, vocab_size)
        for wanted in (want_confident, want_unconfident)
    )


def _save(ctx, inputs, output) -> None:
    confident, unconfident, labels, lam, *ctx.scalars = inputs
    ctx.save_for_backward(confident, unconfident, labels, lam, *output[1:])


def _differentiate(ctx, d_loss, *_):
    confident, unconfident, labels, lam, maximum, total = ctx.saved_tensors
    want = ctx.needs_input_grad[:2]
    gradients = mixup_backward(
        confident, unconfident, labels, lam, *ctx.scalars, maximum, total, d_loss, *want
    )
    return (
        *(gradient if wanted else None for gradient, wanted in zip(gradients, want, strict=True)),
        *[None] * 5,
    )


def _refuse(ctx, *_) -> NoReturn:
    raise RuntimeError(
        'mixup_cross_entropy with backend="triton" has no second derivative. Use backend="torch".'
    )


mixup_forward.register_autograd(_differentiate, setup_context=_save)
mixup_backward.register_autograd(_refuse)


def _common(confident, unconfident, labels, lam, scale, cap, ignore_index):
    """Returns what both kernels begin with, and their compile-time options."""
    accumulate = torch.promote_types(confident.dtype, torch.float32)
    # Rows may be strided (every second row of a larger tensor), columns may not: the kernels read
    # 16 bytes at a time.
    confident = confident if confident.stride(1) == 1 else confident.contiguous()
    if unconfident is not None and unconfident.stride(1) != 1:
        unconfident = unconfident.contiguous()
    strides = (confident.stride(0), 0 if unconfident is None else unconfident.stride(0))
    tensors = (confident, unconfident, labels.contiguous(), lam.to(accumulate).contiguous())
    options = {
        "SCALE": scale,  # compile-time: one value per model, and exact in float64
        "CAP": cap,
        "ACCUMULATE": tl.float64 if accumulate == torch.float64 else tl.float32,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(confident.shape[1])),
        "num_warps": 8,
    }
    return (*tensors, *strides, confident.shape[1], ignore_index), options


@triton.jit
def _mixed(
    c_ptr,
    u_ptr,
    column,
    mask,
    lam,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    # Padding is 0. A caller that needs -inf masks after mixing, because lam * -inf + 0 * -inf is
    # NaN.
    z = tl.load(c_ptr + column, mask=mask, other=0.0).to(ACCUMULATE)
    if u_ptr is not None:
        z = lam * z + (1.0 - lam) * tl.load(u_ptr + column, mask=mask, other=0.0).to(ACCUMULATE)
    return _softcap(z * SCALE, CAP)


@triton.jit
def _forward_kernel(
    c_ptr,
    u_ptr,
    labels_ptr,
    lam_ptr,
    c_stride,
    u_stride,
    V,
    ignore_index,
    loss_ptr,
    maximum_ptr,
    total_ptr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # int64: pair * c_stride overflows int32 once M * V > 2**31
    pair = tl.program_id(0).to(tl.int64)
    c_ptr += pair * c_stride
    if u_ptr is not None:
        u_ptr += pair * u_stride
    lam = tl.load(lam_ptr + pair)
    y_c = tl.load(labels_ptr + 2 * pair)
    y_u = tl.load(labels_ptr + 2 * pair + 1)

    # The maximum starts at a number, not at -inf: a first tile full of -inf logits would give
    # exp(-inf + inf).
    maximum = tl.full((), LOWEST, ACCUMULATE)
    total = tl.full((), 0.0, ACCUMULATE)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        logits = _mixed(c_ptr, u_ptr, column, inside, lam, SCALE, CAP, ACCUMULATE)
        maximum, total = _online(maximum, total, tl.where(inside, logits, -float("inf")))

    known_c = (y_c >= 0) & (y_c < V)
    known_u = (y_u >= 0) & (y_u < V)
    at_c = tl.where(
        known_c, _mixed(c_ptr, u_ptr, y_c, known_c, lam, SCALE, CAP, ACCUMULATE), float("nan")
    )
    at_u = tl.where(
        known_u, _mixed(c_ptr, u_ptr, y_u, known_u, lam, SCALE, CAP, ACCUMULATE), float("nan")
    )
    # Subtract the maximum from the logits first: large logits would cancel.
    loss = tl.log(total) - (lam * (at_c - maximum) + (1.0 - lam) * (at_u - maximum))
    alive = (y_c != ignore_index) & (y_u != ignore_index)
    tl.store(loss_ptr + pair, tl.where(alive, loss, 0.0))
    tl.store(maximum_ptr + pair, maximum)
    tl.store(total_ptr + pair, total)


@triton.jit
def _backward_kernel(
    c_ptr,
    u_ptr,
    labels_ptr,
    lam_ptr,
    c_stride,
    u_stride,
    V,
    ignore_index,
    maximum_ptr,
    total_ptr,
    d_loss_ptr,
    d_c_ptr,
    d_u_ptr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    c_ptr += pair * c_stride
    if u_ptr is not None:
        u_ptr += pair * u_stride
    lam = tl.load(lam_ptr + pair)
    y_c = tl.load(labels_ptr + 2 * pair)
    y_u = tl.load(labels_ptr + 2 * pair + 1)
    alive = (y_c != ignore_index) & (y_u != ignore_index)
    maximum = tl.load(maximum_ptr + pair)
    total = tl.load(total_ptr + pair)
    d_loss = tl.load(d_loss_ptr + pair)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        logits = _mixed(c_ptr, u_ptr, column, inside, lam, SCALE, CAP, ACCUMULATE)
        # Compared, not scattered: right for equal labels, too.
        target = tl.where(column == y_c, lam, 0.0) + tl.where(column == y_u, 1.0 - lam, 0.0)
        gradient = (
            d_loss * (tl.exp(logits - maximum) / total - target) * _d_softcap(logits, CAP) * SCALE
        )
        # Select instead of multiplying by 0: an ignored pair must give exact zeros even for
        # infinite logits.
        gradient = tl.where(alive, gradient, 0.0)
        if d_c_ptr is not None:
            d_c = gradient if u_ptr is None else lam * gradient
            tl.store(d_c_ptr + pair * V + column, d_c.to(d_c_ptr.dtype.element_ty), mask=inside)
        if d_u_ptr is not None:
            tl.store(
                d_u_ptr + pair * V + column,
                ((1.0 - lam) * gradient).to(d_u_ptr.dtype.element_ty),
                mask=inside,
            )
