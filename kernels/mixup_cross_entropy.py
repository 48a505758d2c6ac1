"""Cross-entropy of mixed logits against mixed labels, one loss per pair: definition, and dispatch
to the Triton version.

SFTMix (Xiao et al., https://arxiv.org/abs/2410.05248) trains the mixture of a confident and an
unconfident position against the mixture of their one-hot labels. Cross-entropy is linear in its
target, so no one-hot tensor is needed. With s the soft-cap (identity where there is none) and z_c,
z_u the raw logits of the members,

    z = lam z_c + (1 - lam) z_u        l = s(scale z)
    loss = logsumexp(l) - lam l[y_c] - (1 - lam) l[y_u]

Mixing comes before the soft-cap, because only raw logits are affine in the hidden states. If the
embeddings or hidden states were already mixed, z is given directly. The gradients are

    g = scale s'(scale z) (softmax(l) - lam onehot(y_c) - (1 - lam) onehot(y_u))
    dz_c = lam g        dz_u = (1 - lam) g

Unlike `fused_linear_mixup_cross_entropy`, this function takes logits, returns one loss per pair,
and does not modify its arguments.

Axes: M pairs, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.backends import choose_backend, softcapped


def mixup_cross_entropy(
    confident_logits: Tensor,
    unconfident_logits: Tensor | None,
    labels: Tensor,
    lam: Tensor,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """Returns the (M,) Mixup losses in nats, differentiable in the logits; float32, or float64 for
    float64 logits.

    confident_logits, unconfident_logits: (M, V) raw logits of one dtype; None for the second: the
    first are mixed already. labels: (M, 2) int64 or int32 in [0, V) or `ignore_index`; of the
    confident and of the unconfident member. lam: (M,) float32 or float64 in [0, 1], the share of
    the confident member; gets no gradient. backend: "triton", or "torch", which is the definition
    and so the "reference" too; default: "triton" for tensors on a GPU,
        else "torch".

    A pair with an ignored member gives 0 and exact zero gradients, whatever its logits are.
    "triton" refuses a second derivative; "torch" has all of them. Raises ValueError for arguments
    that do not fit together, an unknown backend, or Triton without a GPU.
    """
    backend = choose_backend(backend, confident_logits)
    _check(confident_logits, unconfident_logits, labels, lam)
    if backend != "triton":
        return _definition(
            confident_logits,
            unconfident_logits,
            labels,
            lam,
            logit_scale,
            logit_softcap,
            ignore_index,
        )
    # Import triton only when it is used: it is not available on every platform, and it reads
    # TRITON_INTERPRET when it is imported.
    from sftmix.kernels.mixup_cross_entropy_triton import mixup_forward

    scale = 1.0 if logit_scale is None else float(logit_scale)
    cap = None if logit_softcap is None else float(logit_softcap)
    return mixup_forward(
        confident_logits, unconfident_logits, labels, lam, scale, cap, ignore_index
    )[0]


def _definition(
    confident_logits: Tensor,
    unconfident_logits: Tensor | None,
    labels: Tensor,
    lam: Tensor,
    logit_scale: float | None,
    logit_softcap: float | None,
    ignore_index: int,
) -> Tensor:
    accumulate = torch.promote_types(confident_logits.dtype, torch.float32)
    # never in the logits' dtype: bfloat16 has no number between 0.996 and 1
    share = lam.detach().to(accumulate)[:, None]
    mixed = confident_logits.to(accumulate)
    if unconfident_logits is not None:
        mixed = share * mixed + (1 - share) * unconfident_logits.to(accumulate)
    # Filled, not multiplied by 0: what is in the logits of a dead pair reaches neither the loss
    # nor, on the way back, a gradient.
    dead = (labels == ignore_index).any(dim=1)
    capped = mixed.masked_fill(dead[:, None], 0.0)
    if logit_scale is not None:
        capped = logit_scale * capped
    capped = softcapped(capped, logit_softcap)
    # log_softmax subtracts the maximum before anything else; both shares sum to 1, so this is the
    # equation above.
    log_p = torch.log_softmax(capped, dim=1).gather(1, labels.masked_fill(dead[:, None], 0).long())
    loss = -(torch.cat([share, 1 - share], dim=1) * log_p).sum(dim=1)
    return loss.masked_fill(dead, 0.0)


def _check(
    confident_logits: Tensor, unconfident_logits: Tensor | None, labels: Tensor, lam: Tensor
) -> None:
    unconfident = confident_logits if unconfident_logits is None else unconfident_logits
    num_pairs = confident_logits.shape[0] if confident_logits.dim() else 0
    fits = (
        confident_logits.dim() == 2
        and (unconfident.shape, unconfident.dtype)
        == (confident_logits.shape, confident_logits.dtype)
        and confident_logits.is_floating_point()
        and labels.shape == (num_pairs, 2)
        and labels.dtype in (torch.int64, torch.int32)
        and lam.shape == (num_pairs,)
        and lam.dtype in (torch.float32, torch.float64)
    )
    if not fits:
        arguments = {
            "confident_logits": confident_logits,
            "unconfident_logits": unconfident_logits,
            "labels": labels,
            "lam": lam,
        }
        found = ", ".join(
            f"{name} {None if t is None else (tuple(t.shape), t.dtype)}"
            for name, t in arguments.items()
        )
        raise ValueError(
            f"mixup_cross_entropy found {found}; expected confident_logits (M, V),"
            " unconfident_logits of the same shape and dtype or None, labels (M, 2) int64 or"
            " int32, lam (M,) float32 or float64"
        )
