"""The chunked form of the SFTMix loss: matrix products over pieces of the rows, an epilogue between
them.

Per chunk of rows: logits = hidden @ weight.T, the epilogue (`pair_epilogue.py`) turns them into
losses and, in place, into their gradient, then d hidden = d logits @ weight and d weight += d
logits.T @ hidden. Gradients are formed in the forward, while a chunk's logits are there, and handed
out by the backward, so that autograd (and ZeRO-3's hooks) see the weight's gradient once.

A custom operator, not a `torch.autograd.Function`: `torch.compile` then sees one opaque node.

Axes: T rows that predict a response token, M mixed positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sftmix.kernels.pair_epilogue import pair_epilogue_torch
from sftmix.kernels.token_weights import entropy_weights

# Bytes of raw logits that live at once. Chunks are balanced, and a pair is never split between two.
WORKSPACE_BYTES = 1 << 30
# With fewer rows the product is limited by memory: it reads the whole weight for little arithmetic.
MIN_CHUNK_ROWS = 2048
# Chunks have a multiple of this many rows, if there are enough, so that the tiles of a GPU's matrix
# product are full.
ROW_MULTIPLE = 128


# Positions in the signature of `chunked_linear_mixup`, for autograd, which sees it as a tuple.
NUM_ARGUMENTS = 21
ONE_OVER_NTP = 7
DIFFERENTIABLE = slice(0, 3)  # hidden, weight, bias
WANTED = slice(18, 21)  # which of these three need a gradient
GRADIENTS = slice(4, 7)  # of these three, among the outputs


@torch.library.custom_op("sftmix::chunked_linear_mixup", mutates_args=())
def chunked_linear_mixup(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    pairs: Tensor,
    lam: Tensor,
    row_weights: Tensor | None,
    one_over_ntp: Tensor,
    one_over_mixup: Tensor,
    mixup_weight: float,
    logit_scale: float,
    logit_softcap: float | None,
    ignore_index: int,
    ntp_weight: float,
    weighting: str,
    alpha: float,
    label_smoothing: float,
    backend: str,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, ntp, mixup (scalars), token_nll (T,) float32, and the gradients d_hidden (T,
    D), d_weight (V, D), d_bias (V,). The gradients lack the factor `one_over_ntp`, which `backward`
    applies. Unwanted gradients are empty.

    Arguments as `fused_linear_mixup_cross_entropy`, which checks their shapes; the normalisers as
    0-d tensors.
    """
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    num_pairs = pairs.shape[0]
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    epilogue = _epilogue(backend)
    check_rows(labels, pairs, vocab_size, ignore_index)

    order = pair_order(num_rows, pairs) if num_pairs else None
    targets = labels if order is None else labels.index_select(0, order)

    token_nll = hidden.new_zeros(num_rows, dtype=accumulate)
    mixup_nll = hidden.new_zeros(num_pairs, dtype=accumulate)
    d_hidden = hidden.new_empty(hidden.shape if want_hidden else (0, hidden.shape[1]))
    # the first product fills it
    d_weight = weight.new_empty(weight.shape if want_weight else 0, dtype=accumulate)
    if not num_rows:
        d_weight.zero_()
    d_bias = weight.new_zeros(vocab_size if want_bias else 0, dtype=accumulate)

    # Weights of order one in the chunks; 1 / tokens, which float16 cannot hold, follows in float32
    # in the backward.
    is_dft, has_entropy = weighting == "dft", weighting in ("eaft", "eaft_unscaled")
    is_ntp = weighting == "none" and not label_smoothing and row_weights is None
    transform = (logit_scale, logit_softcap, ignore_index)
    ntp_share = torch.full_like(one_over_ntp, ntp_weight)
    if row_weights is not None and order is not None:
        row_weights = row_weights.index_select(0, order)
    objective = torch.zeros_like(one_over_ntp)  # sum of what replaces the plain loss of each row
    mixup_share = mixup_weight * one_over_mixup / one_over_ntp
    # The torch epilogue works on a copy in float32 where the logits are not; the Triton one in
    # registers.
    itemsize = hidden.element_size() if epilogue is not pair_epilogue_torch else accumulate.itemsize
    chunks = balanced_chunks(num_rows, vocab_size, itemsize)
    slab = hidden.new_empty(max((stop - start for start, stop in chunks), default=0), vocab_size)
    for start, stop in chunks:
        here = None if order is None else order[start:stop]
        chunk = hidden[start:stop] if here is None else hidden.index_select(0, here)
        logits = logits_of(chunk, weight, bias, out=slab[: stop - start])
        # pairs of neighbours in this chunk
        first, last = min(start // 2, num_pairs), min(stop // 2, num_pairs)
        weights = ntp_share if row_weights is None else ntp_share * row_weights[start:stop]
        if has_entropy:
            weights = weights * entropy_weights(
                weighting, alpha, logits, targets[start:stop], *transform
            )
        nll, mixup_nll[first:last], even = epilogue(
            logits,
            targets[start:stop],
            lam[first:last],
            weights,
            mixup_share,
            *transform,
            want_hidden or want_weight or want_bias,
            label_smoothing,
            is_dft,
        )
        token_nll[start:stop] = nll
        if not is_ntp:
            shown = weights * torch.exp(-nll) if is_dft else weights
            objective += (shown * torch.lerp(nll, even, label_smoothing)).sum()
        d_logits = logits  # overwritten
        if want_bias:
            d_bias += d_logits.sum(dim=0, dtype=accumulate)
        if want_hidden:
            if here is None:
                torch.mm(d_logits, weight, out=d_hidden[start:stop])
            else:
                d_hidden.index_copy_(0, here, torch.mm(d_logits, weight))
        if want_weight:
            add_product(d_weight, d_logits.t(), chunk, is_first=start == 0)

    if order is not None:
        token_nll = torch.empty_like(token_nll).index_copy_(0, order, token_nll)
    ntp = token_nll.sum() * one_over_ntp
    mixup = mixup_nll.sum() * one_over_mixup
    loss = (ntp_weight * ntp if is_ntp else objective * one_over_ntp) + mixup_weight * mixup
    return loss, ntp, mixup, token_nll.float(), d_hidden, d_weight, d_bias


@chunked_linear_mixup.register_fake
def _(hidden, weight, bias, labels, pairs, lam, row_weights, one_over_ntp, *options):  # type: ignore[no-untyped-def]
    want_hidden, want_weight, want_bias = options[-3:]
    accumulate = one_over_ntp.dtype
    return (
        *(hidden.new_empty((), dtype=accumulate) for _ in range(3)),
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if want_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if want_weight else 0, dtype=accumulate),
        weight.new_empty(weight.shape[0] if want_bias else 0, dtype=accumulate),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # do not allocate zero gradients of the weight's size for outputs without one
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[DIFFERENTIABLE]]
    ctx.wanted = inputs[WANTED]
    ctx.save_for_backward(
        *(gradient.detach() for gradient in output[GRADIENTS]), inputs[ONE_OVER_NTP]
    )


def _backward(
    ctx: Any, d_loss: Tensor | None, *d_others: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * NUM_ARGUMENTS
    if any(d is not None for d in d_others):
        raise RuntimeError(
            "only the first output of chunked_linear_mixup, the loss, has a gradient"
        )
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the fused loss has a first derivative only, and create_graph=True asks for a second."
            ' Use backend="reference", which has all.'
        )
    *gradients, one_over_ntp = ctx.saved_tensors
    # Compute in float32: a loss scale of 2**16 overflows float16. Cast explicitly, because autograd
    # would cast silently. Make new tensors, so that a second backward through a retained graph
    # finds the saved ones unchanged.
    factor = d_loss.to(one_over_ntp.dtype) * one_over_ntp
    scaled = [
        _scaled(gradient, factor, dtype) if wanted else None
        for gradient, wanted, dtype in zip(gradients, ctx.wanted, ctx.dtypes, strict=True)
    ]
    return (*scaled, *[None] * (NUM_ARGUMENTS - len(scaled)))


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # the weight's dtype: rounded while it is written, without a second float32 copy
    if gradient.dtype == factor.dtype != dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient.to(factor.dtype) * factor).to(dtype)


chunked_linear_mixup.register_autograd(_backward, setup_context=_save)


def _epilogue(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if backend == "torch":
        return pair_epilogue_torch
    # Import triton only when it is used: it is not available on every platform, and it reads
    # TRITON_INTERPRET when it is imported.
    from sftmix.kernels.pair_epilogue_triton import pair_epilogue

    return pair_epilogue


def check_rows(labels: Tensor, pairs: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Checks that labels are in the vocabulary, and that each row of `pairs` exists and is in one
    pair only. Otherwise the kernels would access memory out of bounds. Raises ValueError on a CPU;
    on a GPU a device-side assertion fails, which avoids a synchronisation."""
    num_rows = labels.shape[0]
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    inside = (pairs >= 0) & (pairs < num_rows)
    uses = torch.zeros(num_rows + 1, dtype=torch.int32, device=labels.device)
    slots = torch.where(inside, pairs, num_rows).reshape(-1)
    uses.index_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))
    once = uses[:num_rows] <= 1
    if labels.device.type != "cpu":
        torch._assert_async(
            known.all() & inside.all() & once.all(),
            "sftmix: a label outside the vocabulary, or a row in two pairs",
        )
        return
    if not known.all():
        row = int((~known).nonzero()[0])
        raise ValueError(
            f"label {int(labels[row])} in row {row}: expected 0 to {vocab_size - 1}, or"
            f" {ignore_index}"
        )
    if not inside.all():
        raise ValueError(f"pairs name row {int(pairs[~inside][0])}, and there are {num_rows} rows")
    if not once.all():
        raise ValueError(
            f"row {int((~once).nonzero()[0])} stands in two pairs: a row may be mixed once"
        )


def pair_order(num_rows: int, pairs: Tensor) -> Tensor:
    """Returns (T,) int64: a permutation of the rows in which partners are neighbours (c0, u0, c1,
    u1, ...), followed by the rows without a partner in their own order. No device-to-host sync."""
    paired = pairs.reshape(-1)
    has_partner = torch.zeros(num_rows, dtype=torch.int8, device=pairs.device)
    has_partner[paired] = 1
    alone = torch.argsort(has_partner, stable=True)[: num_rows - paired.numel()]
    return torch.cat([paired, alone])


def balanced_chunks(num_rows: int, vocab_size: int, itemsize: int) -> list[tuple[int, int]]:
    """Returns [start, stop) row ranges of nearly equal, even length whose logits fit
    WORKSPACE_BYTES, or that have MIN_CHUNK_ROWS rows where those do not fit; up to ROW_MULTIPLE - 1
    rows more."""
    budget = max(MIN_CHUNK_ROWS, WORKSPACE_BYTES // (vocab_size * itemsize))
    num_chunks = max(1, -(-num_rows // budget))
    size = max(2, -(-num_rows // num_chunks))
    # even, so that a pair of neighbours stays in one chunk
    multiple = ROW_MULTIPLE if size > ROW_MULTIPLE else 2
    size = -(-size // multiple) * multiple
    return [(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    """Writes hidden (N, D) @ weight (V, D).T + bias into `out` (N, V), and returns it."""
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Adds left (V, N) @ right (N, D) to `total` (V, D), or fills it where `is_first`, in the dtype
    of `total`."""
    beta = 0 if is_first else 1  # 0 does not read what is there
    if total.dtype == right.dtype:
        total.addmm_(left, right, beta=beta)
    elif _has_wide_products(right):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)  # type: ignore[call-overload]
    elif is_first:
        total.copy_(torch.mm(left, right))
    else:
        total.add_(torch.mm(left, right))


def _has_wide_products(operand: Tensor) -> bool:
    # cuBLAS adds half-precision products to a float32 matrix in place, from compute capability 8.0
    # on.
    return (
        operand.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(operand.device) >= (8, 0)
    )
