"""Interpolated rows of an embedding (or hidden state) matrix, one per pair, with a deterministic
gradient.

Manifold Mixup below the head: row m of the result is lam_m E[c_m] + (1 - lam_m) E[u_m]. A row of E
is the confident member of one pair at most and the unconfident member of one pair at most, so its
gradient has two terms at most. Two inverse maps (row -> pair) find them, so no two threads add to
the same number:

    dE[r] = lam_m g_m + (1 - lam_n) g_n

where r is the confident member of pair m, and the unconfident member of pair n

Where only one member exists (the rest of the longer response), the pair (r, r) gives the row
itself.

Axes: T rows, M pairs, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sftmix.kernels.backends import choose_backend


def mixed_embeddings(
    embeddings: Tensor, pairs: Tensor, lam: Tensor, backend: str | None = None
) -> Tensor:
    """Returns (M, D) `lam * embeddings[pairs[:, 0]] + (1 - lam) * embeddings[pairs[:, 1]]` in the
    dtype of the embeddings.

    embeddings: (T, D); interpolated in float32 (float64 for float64) and rounded once; the gradient
    likewise. pairs: (M, 2) int64 or int32; the row of the confident and of the unconfident member.
    No row twice in one column;
        in both is allowed, also in one pair, (r, r), whose result is the row bit for bit whatever
        lam is.
    lam: (M,) float32 or float64 in [0, 1], the share of the confident member; gets no gradient.
    backend: "triton", or "torch", which is the definition and so the "reference" too; default:
    "triton" for tensors on a GPU,
        else "torch".

    "triton" refuses a second derivative; "torch" has all of them. Raises ValueError for arguments
    that do not fit together, an unknown backend, Triton without a GPU, or, on a CPU, a row twice in
    a column; a GPU reports that by a device-side assertion, for which nothing waits.
    """
    backend = choose_backend(backend, embeddings)
    _check(embeddings, pairs, lam)
    accumulate = torch.promote_types(embeddings.dtype, torch.float32)
    slots = inverse_maps(pairs, embeddings.shape[0])
    # A row paired with itself is copied: lam x + (1 - lam) x equals x only up to rounding.
    share = lam.detach().to(accumulate).masked_fill(pairs[:, 0] == pairs[:, 1], 1.0)
    if backend != "triton":
        # cast before indexing, so that the two terms of the gradient are added before rounding
        rows = embeddings.to(accumulate)
        mixed = share[:, None] * rows[pairs[:, 0]] + (1 - share[:, None]) * rows[pairs[:, 1]]
        return mixed.to(embeddings.dtype)
    # Import triton only when it is used: it is not available on every platform, and it reads
    # TRITON_INTERPRET when it is imported.
    from sftmix.kernels.mixed_embeddings_triton import mixed_forward

    return mixed_forward(embeddings, pairs, share, slots)


def inverse_maps(pairs: Tensor, num_rows: int) -> Tensor:
    """Returns (2, T) int64: for each row, the pair of which it is the confident and the unconfident
    member, or -1.

    A row that is twice in one column of `pairs` is an error: ValueError on a CPU, a device-side
    assertion elsewhere and in compiled code (RuntimeError on a CPU).
    """
    remedy = "A row may be the confident member of one pair, and the unconfident member of one."
    order = torch.arange(pairs.shape[0], device=pairs.device)
    slots = torch.full((2, num_rows), -1, dtype=torch.int64, device=pairs.device)
    for column, member in enumerate(("confident", "unconfident")):
        rows = pairs[:, column].long()
        slots[column].index_copy_(0, rows, order)
        # If two pairs wrote to one row, one of them finds the other's number.
        repeated = slots[column].index_select(0, rows) != order
        if pairs.device.type == "cpu" and not torch.compiler.is_compiling():
            if repeated.any():
                row = int(rows[repeated][0])
                raise ValueError(
                    f"mixed_embeddings: row {row} is the {member} member of more than one pair."
                    f" {remedy}"
                )
        else:  # reading the value would synchronise with the device, and cannot be compiled
            torch._assert_async(
                ~repeated.any(),
                f"mixed_embeddings: a row is the {member} member of more than one pair. {remedy}",
            )
    return slots


def _check(embeddings: Tensor, pairs: Tensor, lam: Tensor) -> None:
    num_pairs = lam.shape[0] if lam.dim() else 0
    fits = (
        embeddings.dim() == 2
        and embeddings.is_floating_point()
        and pairs.shape == (num_pairs, 2)
        and pairs.dtype in (torch.int64, torch.int32)
        and lam.shape == (num_pairs,)
        and lam.dtype in (torch.float32, torch.float64)
    )
    if not fits:
        arguments = {"embeddings": embeddings, "pairs": pairs, "lam": lam}
        found = ", ".join(f"{name} {tuple(t.shape), t.dtype}" for name, t in arguments.items())
        raise ValueError(
            f"mixed_embeddings found {found}; expected embeddings (T, D), pairs (M, 2) int64 or"
            " int32, lam (M,) float32 or float64"
        )
