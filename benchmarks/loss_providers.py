"""The losses that `benchmarks/loss_kernels.py` times: ours, the textbook form, and the peers'
where they are installed.

Each provider is a function of a `Problem` that gives a scalar loss, or tensors where nothing is
differentiated. A peer that cannot run here raises `NotMeasured` with the reason, which becomes its
row.

Axes: T rows, D hidden size, V vocabulary, M pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy
from sftmix.kernels.linear_token_nll import linear_token_nll

MU = 0.2


class NotMeasured(Exception):
    """Why a provider has no figure here."""


@dataclass
class Problem:
    """hidden (T, D), weight (V, D), labels (T,), pairs (M, 2), lam (M,): all rows have a label, all
    are paired."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    pairs: Tensor
    lam: Tensor
    softcap: float | None

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight


def draw(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    softcap: float | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Problem:
    """Returns a problem with weights N(0, 0.02), in which about 60% of the tokens have a
    probability above one half: the time of a product and of some peers depends on the data."""
    generator = torch.Generator(device).manual_seed(0)
    weight = 0.02 * torch.randn(vocab_size, hidden_size, generator=generator, device=device)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device=device)
    # Along the label's row, so far that most tokens are predicted well.
    strength = (
        torch.rand(num_rows, 1, generator=generator, device=device) * 30 / (hidden_size * 0.02**2)
    )
    hidden = strength * weight[labels] + torch.randn(
        num_rows, hidden_size, generator=generator, device=device
    )
    pairs = torch.randperm(num_rows, generator=generator, device=device)[
        : 2 * (num_rows // 2)
    ].view(-1, 2)
    torch.manual_seed(0)
    lam = torch.distributions.Beta(0.5, 0.5).sample((len(pairs),)).to(device)
    return Problem(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        labels,
        pairs,
        lam,
        softcap,
    )


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _textbook_ntp(hidden: Tensor, weight: Tensor, labels: Tensor, cap: float | None) -> Tensor:
    return F.cross_entropy(_capped((hidden @ weight.T).float(), cap), labels)


def _mixed(p: Problem) -> Tensor:
    lam = p.lam[:, None]
    return (lam * p.hidden[p.pairs[:, 0]] + (1 - lam) * p.hidden[p.pairs[:, 1]]).to(p.hidden.dtype)


def _textbook(p: Problem, ntp: Callable[..., Tensor], mixup: Callable[..., Tensor]) -> Tensor:
    confident, unconfident = p.labels[p.pairs].T
    return ntp(p.hidden, p.weight, p.labels, p.softcap) + MU * mixup(
        _mixed(p), p.weight, confident, unconfident, p.lam, p.softcap
    )


def _textbook_mixup(
    mixed: Tensor,
    weight: Tensor,
    confident: Tensor,
    unconfident: Tensor,
    lam: Tensor,
    cap: float | None,
) -> Tensor:
    logits = _capped((mixed @ weight.T).float(), cap)
    to_confident = F.cross_entropy(logits, confident, reduction="none")
    to_unconfident = F.cross_entropy(logits, unconfident, reduction="none")
    return (lam * to_confident + (1 - lam) * to_unconfident).mean()


def _ours(p: Problem, *, mixes: bool, backend: str | None, **objective: Any) -> Tensor:
    pairs, lam = (p.pairs, p.lam) if mixes else (p.pairs[:0], p.lam[:0])
    # known from the batch, as in training
    counts = {"num_ntp_tokens": len(p.labels), "num_mixup_tokens": len(p.pairs)}
    return fused_linear_mixup_cross_entropy(
        p.hidden,
        p.weight,
        p.labels,
        pairs,
        lam,
        MU,
        logit_softcap=p.softcap,
        backend=backend,
        **counts,
        **objective,
    ).loss


def _torch_fused(p: Problem, **options: object) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotMeasured(f"torch {torch.__version__} has no linear_cross_entropy")
    if p.softcap is not None:
        raise NotMeasured("has no soft-cap")
    return F.linear_cross_entropy(
        p.hidden, p.weight, p.labels, options=torch.nn.LinearCrossEntropyOptions(**options)
    )


def _liger(
    p: Problem, rows: Tensor, labels: Tensor, reduction: str, chunk_mem_const: int
) -> Tensor:
    _need_gpu(p)
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise NotMeasured(f"liger-kernel: {error}") from None
    loss = LigerFusedLinearCrossEntropyFunction.apply(
        rows, p.weight, labels, None, None, -100, 0.0, 0.0, reduction, p.softcap,
        False, torch.float32, False, False, False, None, None, chunk_mem_const,
    )  # fmt: skip
    return loss[0] if isinstance(loss, tuple) else loss


def _liger_sftmix(p: Problem) -> Tensor:
    mixed, (confident, unconfident) = _mixed(p), p.labels[p.pairs].T
    ntp = _liger(p, p.hidden, p.labels, "mean", 16)
    to_confident, to_unconfident = (
        _liger(p, mixed, labels.contiguous(), "none", 16) for labels in (confident, unconfident)
    )
    return ntp + MU * (p.lam * to_confident + (1 - p.lam) * to_unconfident).mean()


def _quack(p: Problem) -> Tensor:
    _need_gpu(p)
    if p.softcap is not None:
        raise NotMeasured("has no soft-cap")
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise NotMeasured(f"quack-kernels: {error}") from None
    return chunked_linear_cross_entropy(p.hidden, p.weight, p.labels)


def _cut_cross_entropy(p: Problem, **options: object) -> Tensor:
    _need_gpu(p)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise NotMeasured(f"cut-cross-entropy: {error}") from None
    return linear_cross_entropy(p.hidden, p.weight, p.labels, softcap=p.softcap, **options)


def _need_gpu(p: Problem) -> None:
    if not p.hidden.is_cuda:
        raise NotMeasured("needs a GPU")


def _bare_products(p: Problem) -> Tensor:
    with torch.no_grad():
        logits = p.hidden @ p.weight.T
        logits @ p.weight
        return logits.T @ p.hidden


def _one_product(p: Problem) -> Tensor:
    with torch.no_grad():
        return p.hidden @ p.weight.T


def providers(backend: str | None) -> dict[str, Callable[[Problem], Tensor]]:
    """Returns name -> function. Names begin with what is computed: sftmix, ntp, nll, product, or
    another objective."""
    compiled_ntp = torch.compile(_textbook_ntp, dynamic=False)
    compiled_mixup = torch.compile(_textbook_mixup, dynamic=False)
    objectives: dict[str, dict[str, Any]] = {
        "dft": {"weighting": "dft"},
        "eaft": {"weighting": "eaft"},
        "label-smoothing": {"label_smoothing": 0.1},
    }
    return {
        "sftmix (ours)": lambda p: _ours(p, mixes=True, backend=backend),
        "ntp (ours)": lambda p: _ours(p, mixes=False, backend=backend),
        "sftmix (textbook)": lambda p: _textbook(p, _textbook_ntp, _textbook_mixup),
        "sftmix (textbook, compiled)": lambda p: _textbook(p, compiled_ntp, compiled_mixup),
        "sftmix (composed from Liger)": _liger_sftmix,
        "ntp (F.cross_entropy)": lambda p: _textbook_ntp(p.hidden, p.weight, p.labels, p.softcap),
        "ntp (Liger, chunk_mem_const 1)": lambda p: _liger(p, p.hidden, p.labels, "mean", 1),
        "ntp (Liger, chunk_mem_const 16)": lambda p: _liger(p, p.hidden, p.labels, "mean", 16),
        "ntp (QuACK)": _quack,
        "ntp (F.linear_cross_entropy)": _torch_fused,
        "ntp (F.linear_cross_entropy, 4096)": lambda p: _torch_fused(p, batch_chunk_size=4096),
        "ntp (Cut Cross Entropy)": _cut_cross_entropy,
        "ntp (Cut Cross Entropy, no filter)": lambda p: _cut_cross_entropy(p, filter_eps=None),
        "products (three, bare)": _bare_products,
        "nll (ours)": lambda p: linear_token_nll(
            p.hidden, p.weight, p.labels, logit_softcap=p.softcap, backend=backend
        ),
        "product (one, bare)": _one_product,
        **{
            f"{name} (ours)": lambda p, o=options: _ours(p, mixes=False, backend=backend, **o)
            for name, options in objectives.items()
        },
    }
