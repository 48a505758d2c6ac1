"""The train stage: SFTMix."""

from __future__ import annotations

from sftmix.pipeline.context import Facts, StageContext
from sftmix.pipeline.stages.training import train_target


def run(context: StageContext) -> Facts:
    """Trains the target with next-token prediction and Mixup."""
    return train_target(context, "sftmix", mixup_weight=context.config.mixup.weight)
