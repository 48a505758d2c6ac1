"""Requests to the head, and its results.

Results are named tuples, because DeepSpeed's ZeRO-3 hooks find a module's output tensors in tuples.

Axes: T requested rows, M mixed positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sftmix.batches.mixed_inputs import MixedInputs
from sftmix.config.schema import NTP, ObjectiveConfig


@dataclass(frozen=True)
class LossRequest:
    """What the head needs to turn hidden states into the loss. Shapes as in `MicroBatch`;
    `mixed_inputs` replaces `pairs` if input embeddings are mixed. row_weights: (T,) factors of the
    next-token losses, besides those that `next_token` states for tokens."""

    rows: Tensor
    labels: Tensor
    pairs: Tensor
    lam: Tensor
    num_ntp_tokens: int
    num_mixup_tokens: int
    mixup_weight: float
    backend: str | None = None
    mixed_inputs: MixedInputs | None = None
    next_token: ObjectiveConfig = NTP
    row_weights: Tensor | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """Token losses without gradients. rows: (T,) flat positions; labels: (T,)."""

    rows: Tensor
    labels: Tensor
    backend: str | None = None


@dataclass(frozen=True)
class MixedRequest:
    """The Mixup loss of hidden states computed from mixed inputs. rows: (M,) flat positions;
    labels: (M, 2)."""

    rows: Tensor
    labels: Tensor
    lam: Tensor
    num_mixup_tokens: int
    backend: str | None = None


class LossResult(NamedTuple):
    """One micro-batch's shares of its step's means, in nats. loss: scalar, differentiated; it
    includes the auxiliary loss of a mixture of experts, which is 0 for other models. ntp, mixup,
    auxiliary: scalars, detached. token_nll: (T,) float32."""

    loss: Tensor
    ntp: Tensor
    mixup: Tensor
    token_nll: Tensor
    auxiliary: Tensor

    def detached(self) -> LossResult:
        """Returns the same figures without the graph."""
        return self._replace(loss=self.loss.detach())


class ScoreResult(NamedTuple):
    """nll: (T,) float32, in nats. match: (T,) bool, whether greedy decoding would choose the label.
    top_nll: (T,) float32, the nll of the token that greedy decoding would choose."""

    nll: Tensor
    match: Tensor
    top_nll: Tensor

    def cpu(self) -> ScoreResult:
        """Returns the same figures on the CPU."""
        return ScoreResult(*(values.cpu() for values in self))


class MixedResult(NamedTuple):
    """mixup: scalar, in nats, differentiated: the share of the step's mean over mixed positions."""

    mixup: Tensor


Request = LossRequest | ScoreRequest | MixedRequest
HeadResult = LossResult | ScoreResult | MixedResult
