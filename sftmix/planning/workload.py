"""The micro-batches of a run: from the lengths of its prepared data, or from assumed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sftmix.batches.balance import SAMPLED_STEPS, cut_and_weigh
from sftmix.batches.examples import TokenisedExamples
from sftmix.config.schema import Config, TrainConfig
from sftmix.pairing.matching import Matching, singles
from sftmix.planning.step import Load

Lengths = NDArray[np.int64]
# Examples of data that the package has a config for, by the name on the Hub (the data's own pages).
PUBLISHED = {
    "tatsu-lab/alpaca": 52_002,
    "HuggingFaceH4/ultrachat_200k": 207_865,
    "allenai/tulu-3-sft-mixture": 939_343,
}
ASSUMED_EXAMPLES, ASSUMED_TOKENS, RESPONSE_SHARE = 50_000, 512, 0.5
SPREAD = 0.7  # of the logarithm of a length: assumed
SAMPLE = 20_000  # assumed lengths that are drawn, at most


@dataclass(frozen=True)
class Data:
    """num_tokens, num_responses: (N,), of a sample of the training examples. num_examples: all of
    them. source: where the lengths come from."""

    num_tokens: Lengths
    num_responses: Lengths
    num_examples: int
    source: str


def data_of(config: Config, *, examples: int | None, tokens: float | None) -> Data:
    """Returns the lengths of a config's data: those of its data stage, unless `examples` or
    `tokens` (mean tokens of an example) are given; or assumed ones."""
    prepared = config.run.dir / "data/train.arrow"
    if examples is None and tokens is None and prepared.is_file():
        found = TokenisedExamples(prepared)
        return Data(
            found.num_tokens,
            found.num_response_tokens,
            len(found),
            f"{len(found):,} prepared examples in {prepared.parent}",
        )
    sources = config.data.all_sources if config.data.generator is None else []
    published = [PUBLISHED.get(source.path) for source in sources]
    known = sum(number or 0 for number in published) if published and all(published) else None
    total = examples or config.data.limit or known or ASSUMED_EXAMPLES
    count = max(2, round(total * (1 - config.data.held_out_share)))
    mean = tokens or min(ASSUMED_TOKENS, config.data.max_length)
    draw = np.random.default_rng(0)  # any: the sample is large
    raw = np.exp(draw.normal(-(SPREAD**2) / 2, SPREAD, min(count, SAMPLE))) * mean
    lengths = np.clip(raw.round(), 4, config.data.max_length).astype(np.int64)
    responses = np.maximum(1, (RESPONSE_SHARE * lengths).astype(np.int64))
    whence = "given" if examples else "published" if known else "assumed"
    how = "given" if tokens else "assumed: prepare the data (`sftmix data`) or give --tokens"
    text = f"{count:,} training examples ({whence}) of {lengths.mean():.0f} tokens ({how})"
    return Data(lengths, responses, count, text)


@dataclass(frozen=True)
class Workload:
    """Steps of one training. load: mean micro-batch of the slowest rank. largest: the micro-batch
    with the most tokens. num_micro_batches: of a step, mean. real_tokens, responses: of a step,
    over all ranks. useful_share: of the ranks' time that computes real tokens if all wait for the
    slowest. idle_ranks: ranks without an example in a typical step."""

    num_steps: int
    load: Load
    largest: Load
    num_micro_batches: float
    real_tokens: float
    real_squares: float
    responses: float
    useful_share: float
    idle_ranks: int


def workload(
    data: Data,
    train: TrainConfig,
    *,
    num_ranks: int,
    paired: bool,
    packs: bool,
    square_share: float,
    seed: int,
) -> Workload:
    """Returns the micro-batches of a training. paired: units are pairs, which stay on a rank.
    packs: not padded."""
    count = len(data.num_tokens)
    if paired:
        order = np.random.default_rng(seed).permutation(count)
        half = count // 2
        matching = Matching(order[:half], order[half : 2 * half], order[2 * half :], seed)
    else:
        matching = singles(count, seed=seed)
    loads: list[Load] = []
    largest = Load(0, 0, 0)
    real = squares = responses = useful = numbers = 0.0
    idle: list[int] = []
    sampled = min(SAMPLED_STEPS, matching.num_steps(train.batch_size))
    for step in range(sampled):
        plan = matching.units(0, *matching.step(step, train.batch_size))
        ranks, balance = cut_and_weigh(
            plan,
            data.num_tokens,
            micro_batch_tokens=train.micro_batch_tokens,
            num_ranks=num_ranks,
            packs=packs,
            square_share=square_share,
        )
        each = [[_load(data, plan.units[piece], packs=packs) for piece in p] for p in ranks]
        examples = [_load(data, plan.units[piece], packs=True) for p in ranks for piece in p]
        costs = [sum(load.tokens + square_share * load.squares for load in one) for one in each]
        slowest = each[int(np.argmax(costs))]
        loads += slowest
        largest = max([largest, *(load for one in each for load in one)])
        numbers += len(slowest)
        real += sum(load.tokens for load in examples)
        squares += sum(load.squares for load in examples)
        responses += sum(load.responses for load in examples)
        useful += balance.useful_share(num_ranks)
        idle.append(sum(cost == 0 for cost in costs))
    steps_of_epoch = max(1, -(-data.num_examples // train.batch_size))
    return Workload(
        num_steps=train.epochs * steps_of_epoch,
        load=_mean(loads),
        largest=largest,
        num_micro_batches=numbers / sampled,
        real_tokens=real / sampled,
        real_squares=squares / sampled,
        responses=responses / sampled,
        useful_share=useful / sampled,
        idle_ranks=int(np.median(idle)),
    )


def _load(data: Data, members: Lengths, *, packs: bool) -> Load:
    """Returns the load of these units in a micro-batch."""
    chosen = members[members >= 0]
    lengths = data.num_tokens[chosen].astype(np.float64)
    if not packs:
        lengths = np.full_like(lengths, lengths.max(initial=0.0))
    return Load(
        float(lengths.sum()), float(data.num_responses[chosen].sum()), float((lengths**2).sum())
    )


def _mean(loads: Sequence[Load]) -> Load:
    return Load(*(float(np.mean(column)) for column in zip(*loads, strict=True)))
