"""The two objectives, as requests to the head. The trainings differ in nothing else.

    next-token   L = L_NTP
    mixup        L = L_NTP + mu L_Mixup     (https://arxiv.org/abs/2410.05248, section 3)

L_NTP may be another next-token loss (`ObjectiveConfig`, docs/objectives.md).

Departs from the paper: both terms are means over their own token positions of the whole optimiser
step, which the paper leaves open, so that the result does not depend on how a step is divided.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.config.schema import NTP, ObjectiveConfig
from sftmix.loss.requests import LossRequest


@dataclass(frozen=True)
class Objective:
    """mixup_weight: mu; 0 is exactly next-token prediction, without any mixing. site: place of the
    interpolation, "head" (the method) or "input_embeddings" (an ablation with a third forward).
    next_token: what takes the place of NTP."""

    mixup_weight: float = 0.0
    site: str = "head"
    next_token: ObjectiveConfig = NTP

    @property
    def mixes_inputs(self) -> bool:
        return self.mixup_weight > 0 and self.site == "input_embeddings"


def loss_request(
    objective: Objective, batch: MicroBatch, counts: StepCounts, *, backend: str | None = None
) -> LossRequest:
    """Returns the request for one micro-batch of a step with the given counts."""
    mixes = objective.mixup_weight > 0 and not objective.mixes_inputs
    return LossRequest(
        rows=batch.rows,
        labels=batch.labels,
        pairs=batch.pairs if mixes else batch.pairs[:0],
        lam=batch.lam if mixes else batch.lam[:0],
        num_ntp_tokens=counts.num_ntp_tokens,
        num_mixup_tokens=counts.num_mixup_tokens,
        mixup_weight=objective.mixup_weight,
        next_token=objective.next_token,
        backend=backend,
        mixed_inputs=batch.mixed_inputs if objective.mixes_inputs else None,
        row_weights=batch.row_weights,
    )
