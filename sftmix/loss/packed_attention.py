"""Attention within documents for transformers models, and the check that packing changes nothing.

transformers lets a model's attention and masks be replaced by name. Ours reads the documents of the
row from the mask that a layer is given, so activation checkpointing, which runs layers again, gives
it the same ones.

Models that keep a state along the row (Mamba), that have no replaceable attention, or that need
more than a causal mask with a window are not packed: `why_not_packed` runs two documents together
and alone, and changes one while it looks at the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sftmix.batches.documents import Documents
from sftmix.errors import first_line
from sftmix.kernels.document_attention import document_attention

NAME = "sftmix_documents"
# Relative to the largest logit; rounding of two correct attentions stays below.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
CHECKED_LENGTHS = (7, 5)


class CannotPack(Exception):
    """This model's attention is more than causal attention with a window."""


@dataclass(frozen=True)
class DocumentMask:
    """What layers get in place of a mask. window: how many keys a query reads; None for all."""

    documents: Documents
    window: int | None


_current: Documents | None = None  # of the forward that is running
_problems: list[str] | None = None  # collected while a model is checked


def _report(problem: str) -> None:
    """Raises CannotPack; during a check it only notes the problem, because an error in the middle
    of a forward would leave ZeRO-3 with gathered weights."""
    if _problems is None:
        raise CannotPack(problem)
    _problems.append(problem)


@contextlib.contextmanager
def attending_within(documents: Documents) -> Iterator[None]:
    """Within the context, masks of a model whose attention is `NAME` are those of `documents`."""
    global _current
    _current = documents
    try:
        yield
    finally:
        _current = None


def _mask(*, mask_function: Callable[..., Tensor], **_: Any) -> DocumentMask:
    assert _current is not None, "a packed model is called within `attending_within`"
    return DocumentMask(_current, _window_of(mask_function, max(_current.lengths)))


def _window_of(mask_function: Callable[..., Tensor], length: int) -> int | None:
    """Returns the window of a mask over `length` positions, from what the last query may read.

    Reports anything but causal attention with or without a window: the query before the last one
    has as many keys in a window, and one less in a chunk."""
    zero, keys = torch.tensor(0), torch.arange(length)
    window = int(mask_function(zero, zero, torch.tensor(length - 1), keys).expand(length).sum())
    for query in {0, max(0, length - 2), length - 1}:
        allowed = mask_function(zero, zero, torch.tensor(query), keys).expand(length)
        if not torch.equal(allowed, (keys <= query) & (keys > query - window)):
            _report("its mask is not causal with a window")
    return None if window == length else window


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, DocumentMask):
        raise CannotPack("its layers change the mask that they are given")
    for name in ("s_aux", "position_bias", "head_mask"):
        if others.get(name) is not None:
            _report(f"its attention has `{name}`")
    documents = attention_mask.documents
    output = document_attention(
        query,
        key,
        value,
        documents.lengths,
        documents.bounds,
        scale=scaling,
        window=attention_mask.window,
        softcap=softcap,
        dropout=dropout,
    )
    return output, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def use_packed_attention(model: Any) -> str | None:
    """Lets a transformers model attend within documents. Returns its own attention's name; None if
    its attention cannot be replaced, and nothing is changed."""
    own: str = model.config._attn_implementation
    if not model._can_set_attn_implementation():
        return None
    model.set_attn_implementation(NAME)
    return own


@contextlib.contextmanager
def _collecting() -> Iterator[list[str]]:
    global _problems
    _problems = []
    try:
        yield _problems
    finally:
        _problems = None


@torch.no_grad()
def why_not_packed(
    packed: Callable[[Tensor, Documents], Tensor],
    alone: Callable[[Tensor], Tensor],
    vocab_size: int,
    device: torch.device,
) -> str | None:
    """Returns why a model cannot be packed; None if it can. Collective where the model is sharded.

    packed: logits (1, S, V) of a row of documents, by `NAME`. alone: logits (1, S, V) of one
    sequence, by the model's own attention.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(vocab_size, (1, length), generator=generator).to(device)
        for length in CHECKED_LENGTHS
    ]
    other = (texts[0] + 1) % vocab_size
    documents = Documents.of(CHECKED_LENGTHS).to(device)
    expected = torch.cat([alone(text)[0] for text in texts])
    with _collecting() as problems:
        try:
            found = packed(torch.cat(texts, dim=1), documents)[0]
            beside_another = packed(torch.cat([other, texts[1]], dim=1), documents)[0]
        except (CannotPack, AttributeError, TypeError, ValueError, RuntimeError) as error:
            problems.append(f"its forward fails ({first_line(error)})")
    if problems:
        return problems[0]
    size = float(expected.abs().max()) or 1.0
    tolerance = TOLERANCE[expected.dtype]
    first = CHECKED_LENGTHS[0]
    leak = float((found[first:] - beside_another[first:]).abs().max()) / size
    if not leak <= tolerance * 1e-2:
        return f"a document changes the one after it (logits by {leak:.1e} of the largest)"
    difference = float((found - expected).abs().max()) / size
    if not difference <= tolerance:
        return f"logits differ from those of each document alone (by {difference:.1e})"
    return None
