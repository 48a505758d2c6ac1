"""Causal attention within the documents of one row of tokens.

Documents follow one another without padding. A query attends to keys of its own document at or
before its position, and with a window only to the last `window` of them:

    out[i] = sum_j softmax_j(softcap(scale q_i k_j)) v_j   j in the same document, 0 <= i-j < window

Backends:

flash       flash-attn's variable-length kernel; GPUs, half precision
varlen      torch.nn.attention.varlen; GPUs, half precision, no soft-cap
flex        FlexAttention, compiled; GPUs
sdpa        torch's scaled_dot_product_attention, one call per document; with a soft-cap the plain
            products. Any device and dtype
reference   one masked product over the whole row, in float64 for float64; for tests

Axes: S tokens of the row, K documents, H query heads, G key and value heads (H is a multiple of G),
E size of query and key heads, F size of value heads.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("flash", "varlen", "flex", "sdpa", "reference")


class _Options(NamedTuple):
    scale: float
    window: int | None
    softcap: float | None
    dropout: float


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    bounds: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Returns (1, S, H, F), differentiable in query, key and value.

    query: (1, H, S, E); key: (1, G, S, E); value: (1, G, S, F). lengths: tokens of each document,
    with the sum S. bounds: (K + 1,) int32 on the tensors' device, first token of each document and
    S. scale: default E ** -0.5. window: None for no limit. backend: default `choose_backend`.
    Raises ValueError for lengths that do not add up to S, and for an unknown backend.
    """
    if sum(lengths) != query.shape[2] or query.shape[0] != 1:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and the documents have {sum(lengths)} tokens,"
            " expected one row with as many tokens"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if window is not None and window >= max(lengths):
        window = None
    if backend is None:
        backend = choose_backend(query, value, softcap=softcap, dropout=dropout)
    options = _Options(scale, window, softcap, dropout)
    if backend == "sdpa":
        return _per_document(query, key, value, lengths, options)
    if backend == "reference":
        return _reference(query, key, value, bounds, options)
    if backend == "flex":
        return _flex(query, key, value, bounds, options)
    if backend in ("varlen", "flash"):
        run = _varlen if backend == "varlen" else _flash
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return run(q, k, v, bounds, max(lengths), options)[None]
    raise ValueError(f"unknown backend {backend!r}, expected one of {', '.join(BACKENDS)}")


def choose_backend(
    query: Tensor, value: Tensor, *, softcap: float | None = None, dropout: float = 0.0
) -> str:
    """Returns the fastest backend that computes this on the tensors' device."""
    if query.device.type != "cuda":
        return "sdpa"
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    has_equal_sizes = query.shape[-1] == value.shape[-1]
    if is_half and has_equal_sizes and importlib.util.find_spec("flash_attn") is not None:
        return "flash"
    if dropout:
        return "sdpa"
    if softcap is not None:
        return "flex" if has_equal_sizes else "sdpa"
    return "varlen" if is_half and has_equal_sizes and _varlen_has_windows() else "sdpa"


def _per_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    options: _Options,
) -> Tensor:
    # `split` has one backward for all pieces; slices would each write a gradient of the whole row
    pieces = [tensor.split(lengths, dim=2) for tensor in (query, key, value)]
    outputs = []
    for q, one_k, one_v in zip(*pieces, strict=True):
        k, v = _for_each_head(one_k, q), _for_each_head(one_v, q)
        length, window = q.shape[2], options.window
        if window is not None and window >= length:
            window = None
        if options.softcap is not None:
            output = _products(q, k, v, _allowed(length, window, q.device), options)
        else:
            output = torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=None if window is None else _allowed(length, window, q.device),
                dropout_p=options.dropout,
                is_causal=window is None,
                scale=options.scale,
            )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _for_each_head(shared: Tensor, query: Tensor) -> Tensor:
    """Returns key or value heads repeated for the query heads that share them."""
    groups = query.shape[1] // shared.shape[1]
    return shared if groups == 1 else shared.repeat_interleave(groups, dim=1)


def _allowed(length: int, window: int | None, device: torch.device) -> Tensor:
    """Returns (length, length) bool: may query i read key j?"""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def _products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    options: _Options,
) -> Tensor:
    scores = query @ key.transpose(-1, -2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
    shares = torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
    return torch.nn.functional.dropout(shares, options.dropout) @ value


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    options: _Options,
) -> Tensor:
    length, document = query.shape[2], _document_of(bounds, query.shape[2])
    allowed = _allowed(length, options.window, query.device) & (document[:, None] == document)
    k, v = _for_each_head(key, query), _for_each_head(value, query)
    return _products(query, k, v, allowed, options).transpose(1, 2)


def _document_of(bounds: Tensor, length: int) -> Tensor:
    """Returns (S,): the number of each token's document."""
    place = torch.arange(length, device=bounds.device, dtype=bounds.dtype)
    return torch.bucketize(place, bounds[1:], right=True)


@functools.cache
def _varlen_has_windows() -> bool:
    """Returns whether this torch has variable-length attention with windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    options: _Options,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if options.window is None else options.window - 1
    output: Tensor = varlen_attn(  # type: ignore[assignment]
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=options.scale,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    options: _Options,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    output: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        dropout_p=options.dropout,
        softmax_scale=options.scale,
        causal=True,
        window_size=(-1, -1) if options.window is None else (options.window - 1, 0),
        softcap=options.softcap or 0.0,
    )
    return output


@functools.cache
def _compiled_flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), create_block_mask


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    options: _Options,
) -> Tensor:
    attention, create_block_mask = _compiled_flex()
    length, window, softcap = query.shape[2], options.window, options.softcap
    document = _document_of(bounds, length)

    def allowed(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (j <= i) & (document[i] == document[j])
        return near if window is None else near & (i - j < window)

    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    mask = create_block_mask(allowed, None, None, length, length, device=query.device)
    output: Tensor = attention(
        query,
        key,
        value,
        score_mod=capped,
        block_mask=mask,
        scale=options.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)
