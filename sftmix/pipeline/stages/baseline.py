"""The baseline stage: next-token prediction alone, in the data order of SFTMix."""

from __future__ import annotations

from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.training import train_target


def run(context: StageContext) -> Facts:
    """Trains the target without Mixup."""
    return train_target(context, "baseline", mixup_weight=0.0)
