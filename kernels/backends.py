"""Which implementation of an operation runs, and the soft-cap that all of them share.

triton      the kernels; needs a GPU (or TRITON_INTERPRET=1)
torch       plain PyTorch, in chunks
reference   the definition, materialised, differentiated by autograd
"""

from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "reference")


def choose_backend(backend: str | None, like: Tensor) -> str:
    """Returns the backend asked for, or the device's own: triton on a GPU, else torch. Raises
    ValueError for another."""
    backend = backend or ("triton" if like.is_cuda else "torch")
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    return backend


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """Returns cap * tanh(logits / cap), or the logits where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def softcapped_with_derivative(logits: Tensor, cap: float | None) -> tuple[Tensor, Tensor | float]:
    """Returns the soft-capped logits and the derivative there."""
    if cap is None:
        return logits, 1.0
    tanh = torch.tanh(logits / cap)
    return cap * tanh, 1 - tanh.square()
