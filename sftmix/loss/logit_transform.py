"""Measure what a model does to its logits after the head (Gemma's soft-cap, Cohere's scale),
instead of reading config keys.

Known values are sent through the model's own forward instead of logits, so no list of families is
needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sftmix.batches.documents import Documents
from sftmix.errors import ConfigError


@dataclass(frozen=True)
class ProbeRequest:
    """Sends `values` (K,) through the model's transform of its logits."""

    values: Tensor


@dataclass(frozen=True)
class LogitTransform:
    """logits = softcap(scale * (hidden @ weight.T + bias)), softcap(x) = cap * tanh(x / cap)."""

    scale: float | None = None
    softcap: float | None = None


# Points to read: near 0 for the scale, far from 0 for the cap, in between to check the fit.
_RAMP = (0.0, 1.0, 1e-3, 1e6, -1e6, 0.5, -0.5, 3.0, -3.0, 10.0, -10.0, 40.0, -40.0, 100.0, -100.0)


@torch.no_grad()
def find_logit_transform(
    model: nn.Module, device: torch.device, *, packs: bool = False
) -> LogitTransform:
    """Returns what the model does to its logits after the head. Collective: all ranks must call it
    (ZeRO-3 gathers).

    model: a CausalLMWithLoss, or an engine around one. packs: its attention is packed. Raises
    ConfigError for anything but a scale and a soft-cap.
    """
    values = torch.tensor(_RAMP, dtype=torch.float32, device=device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    documents = Documents.of((2,)).to(device) if packs else None
    logits = model(ids, torch.ones_like(ids), ProbeRequest(values), documents)
    seen = logits[0, -1].double().cpu()
    at_one, at_small, at_large = (float(seen[i]) for i in (1, 2, 3))
    is_capped = abs(at_large) < abs(1e6 * at_one) * 0.5
    scale = at_small / 1e-3 if is_capped else at_one
    transform = LogitTransform(
        scale=None if abs(scale - 1) < 1e-5 else scale,
        softcap=at_large if is_capped else None,
    )
    expected = scale * values.double().cpu()
    if transform.softcap is not None:
        expected = transform.softcap * torch.tanh(expected / transform.softcap)
    if not torch.allclose(seen, expected, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            "the model changes its logits after the head in a way that is neither a scale nor a"
            f" soft-cap (1 became {at_one:.6g}, 1e6 became {at_large:.6g}); mixing them would not"
            " be the method. This model is not supported."
        )
    return transform
