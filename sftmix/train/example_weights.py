"""IR-DRO: examples with a larger loss weigh more (Chen et al., https://arxiv.org/abs/2402.14270).

    L = sum over the examples i of a step of  w_i L_i        L_i: mean NLL of its response tokens
    w   = softmax(L / temperature), without a gradient       (`kl_reg` in the authors' code)

This is the closed form of the worst case over all weightings of the examples, less temperature x KL
from equal weights. The weights add up to 1 over the step, so the first micro-batch's depend on the
losses of the last: every example runs forward once more, without a gradient, before the step. The
authors normalise each device's batch instead, so that their result depends on how a step is
divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sftmix.batches.collate import MicroBatch
from sftmix.batches.cut import StepCounts
from sftmix.config.schema import ObjectiveConfig
from sftmix.engine.engine import Engine


def weigh_examples(
    engine: Engine, batches: Sequence[MicroBatch], counts: StepCounts, next_token: ObjectiveConfig
) -> Sequence[MicroBatch]:
    """Returns this rank's micro-batches of a step, with `row_weights` if `next_token` is IR-DRO.
    Collective: all ranks must call it, with as many micro-batches."""
    if next_token.weighting != "ir_dro":
        return batches
    temperature = next_token.ir_dro_temperature
    losses, lengths = [], []
    for batch in batches:
        nll = engine.score(batch).nll
        ones = torch.ones_like(nll)
        lengths.append(batch.sum_by_example(ones))
        losses.append(batch.sum_by_example(nll) / lengths[-1])
    # in rank order, so that every rank adds up the same numbers in the same order
    everywhere = engine.ranks.gather_rows(torch.cat(losses)[:, None])
    log_total = torch.logsumexp(everywhere / temperature, dim=0)
    return [
        replace(batch, row_weights=_of_rows(batch, mean / temperature - log_total, length, counts))
        for batch, mean, length in zip(batches, losses, lengths, strict=True)
    ]


def _of_rows(batch: MicroBatch, log_weight: Tensor, length: Tensor, counts: StepCounts) -> Tensor:
    # The head divides sums of tokens by the tokens of the step; w_i L_i divides by those of i.
    per_token = counts.num_ntp_tokens * torch.exp(log_weight) / length
    return per_token[batch.owner].float()
