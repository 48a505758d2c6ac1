"""Triton version of `mixed_embeddings.py` (see there for the mathematics): gather and interpolation
in one pass.

Forward: one program per pair. Backward: one program per row of the embeddings, which finds its two
terms by the inverse maps and writes the row, even if it is in no pair. There are no atomic
additions. Both are custom operators, which `torch.compile` does not look into. A second derivative
raises an error.

Compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 in `tests/kernels/test_ahead_of_time.py`:
no spills.

Axes: T rows, M pairs, D hidden size.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from sftmix.kernels.pair_epilogue_triton import need_gpu
from sftmix.kernels.triton_package import tl, triton

# columns of D per tile: with 4 warps 16 bytes of bfloat16 per thread, on AMD (64 threads a warp)
# too
MAX_BLOCK = 2048


@torch.library.custom_op("sftmix::mixed_embeddings_forward", mutates_args=())
def mixed_forward(embeddings: Tensor, pairs: Tensor, lam: Tensor, slots: Tensor) -> Tensor:
    """Returns the (M, D) interpolated rows.

    Arguments as `mixed_embeddings`, already checked; lam: (M,) in the dtype to interpolate in;
    slots: (2, T) from `inverse_maps`, read by the backward alone.
    """
    need_gpu(embeddings)
    mixed = _mixed_like(embeddings, pairs, lam, slots)
    if mixed.numel():
        rows, options = _rows(embeddings)
        _forward_kernel[(mixed.shape[0],)](
            rows,
            pairs.contiguous(),
            lam.contiguous(),
            mixed,
            rows.stride(0),
            rows.shape[1],
            **options,
        )
    return mixed


@mixed_forward.register_fake
def _mixed_like(embeddings, pairs, lam, slots):
    return embeddings.new_empty(pairs.shape[0], embeddings.shape[1])


@torch.library.custom_op("sftmix::mixed_embeddings_backward", mutates_args=())
def mixed_backward(d_mixed: Tensor, lam: Tensor, slots: Tensor) -> Tensor:
    """Returns the (T, D) gradient in the embeddings. d_mixed: (M, D), the upstream gradient, with
    any strides."""
    need_gpu(d_mixed)
    d_embeddings = _embeddings_like(d_mixed, lam, slots)
    if not d_mixed.numel():
        return d_embeddings.zero_()
    rows, options = _rows(d_mixed)
    arguments = (
        rows,
        slots.contiguous(),
        lam.contiguous(),
        d_embeddings,
        rows.stride(0),
        *d_embeddings.shape,
    )
    _backward_kernel[(d_embeddings.shape[0],)](*arguments, **options)
    return d_embeddings


@mixed_backward.register_fake
def _embeddings_like(d_mixed, lam, slots):
    return d_mixed.new_empty(slots.shape[1], d_mixed.shape[1])


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:])


def _differentiate(ctx, d_mixed):
    return mixed_backward(d_mixed, *ctx.saved_tensors), None, None, None


def _refuse(ctx, *_) -> NoReturn:
    raise RuntimeError(
        'mixed_embeddings with backend="triton" has no second derivative. Use backend="torch".'
    )


mixed_forward.register_autograd(_differentiate, setup_context=_save)
mixed_backward.register_autograd(_refuse)


def _rows(tensor):
    """Returns the tensor with contiguous columns (rows may be strided), and the launch options for
    its width."""
    rows = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    return rows, {"BLOCK": min(MAX_BLOCK, triton.next_power_of_2(rows.shape[1])), "num_warps": 4}


@triton.jit
def _forward_kernel(rows_ptr, pairs_ptr, lam_ptr, mixed_ptr, row_stride, D, BLOCK: tl.constexpr):
    # int64: a row times its stride overflows int32 once T * D > 2**31
    pair = tl.program_id(0).to(tl.int64)
    lam = tl.load(lam_ptr + pair)
    c_ptr = rows_ptr + tl.load(pairs_ptr + 2 * pair).to(tl.int64) * row_stride
    u_ptr = rows_ptr + tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64) * row_stride
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        c = tl.load(c_ptr + column, mask=inside).to(lam.dtype)
        u = tl.load(u_ptr + column, mask=inside).to(lam.dtype)
        mixed = lam * c + (1.0 - lam) * u
        tl.store(mixed_ptr + pair * D + column, mixed.to(mixed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    d_mixed_ptr, slots_ptr, lam_ptr, d_rows_ptr, row_stride, T, D, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot_c = tl.load(slots_ptr + row)
    slot_u = tl.load(slots_ptr + T + row)
    # A row that is no such member loads nothing: its share and gradient are 0, which gives exact
    # zeros.
    has_c = slot_c >= 0
    has_u = slot_u >= 0
    share_c = tl.load(lam_ptr + slot_c, mask=has_c, other=0.0)
    share_u = 1.0 - tl.load(lam_ptr + slot_u, mask=has_u, other=1.0)
    for start in range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < D
        # `where` instead of `&`: in the interpreter, tile & scalar is not boolean.
        g_c = tl.load(
            d_mixed_ptr + slot_c * row_stride + column,
            mask=tl.where(has_c, inside, False),
            other=0.0,
        ).to(share_c.dtype)
        g_u = tl.load(
            d_mixed_ptr + slot_u * row_stride + column,
            mask=tl.where(has_u, inside, False),
            other=0.0,
        ).to(share_u.dtype)
        tl.store(
            d_rows_ptr + row * D + column,
            (share_c * g_c + share_u * g_u).to(d_rows_ptr.dtype.element_ty),
            mask=inside,
        )
