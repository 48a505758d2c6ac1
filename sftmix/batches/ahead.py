"""The micro-batches of a rank's steps, made one step ahead by a thread."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sftmix.batches.balance import Balance, cut_and_weigh
from sftmix.batches.collate import MicroBatch, collate
from sftmix.batches.cut import StepCounts, count_step
from sftmix.batches.examples import TokenisedExamples
from sftmix.pairing.matching import Matching, StepUnits


@dataclass(frozen=True)
class StepBatches:
    """One step on one rank. drawn, counts, balance: of all ranks."""

    drawn: StepUnits
    counts: StepCounts
    balance: Balance
    micro_batches: list[MicroBatch]


@dataclass(frozen=True)
class BatchMaker:
    """How steps become micro-batches; arguments as of `cut_step` and `collate`. pins: batches are
    in page-locked memory, from which a GPU copies while it computes."""

    examples: TokenisedExamples
    matching: Matching
    micro_batch_tokens: int
    num_ranks: int
    rank: int
    packs: bool
    square_share: float
    pad_id: int
    mixes_inputs: bool
    pins: bool = False

    def make(self, epoch: int, start: int, stop: int) -> StepBatches:
        """Returns the step that trains on the units [start, stop) of an epoch."""
        drawn = self.matching.units(epoch, start, stop)
        cut, balance = cut_and_weigh(
            drawn,
            self.examples.num_tokens,
            micro_batch_tokens=self.micro_batch_tokens,
            num_ranks=self.num_ranks,
            packs=self.packs,
            square_share=self.square_share,
        )
        batches = [
            collate(
                self.examples,
                drawn,
                piece,
                pad_id=self.pad_id,
                mixes_inputs=self.mixes_inputs,
                packs=self.packs,
            )
            for piece in cut[self.rank]
        ]
        return StepBatches(
            drawn=drawn,
            # from the plan, before any forward, so that every rank divides by the same number
            counts=count_step(
                drawn, np.arange(len(drawn.units)), self.examples.num_response_tokens
            ),
            balance=balance,
            micro_batches=[batch.pinned() for batch in batches] if self.pins else batches,
        )

    def ahead(self, steps: Iterable[tuple[int, int, int]]) -> Generator[StepBatches, None, None]:
        """Yields `make(*step)` of every step, which a thread makes while the one before it is
        trained. Close the iterator to end the thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending = None
            for step in steps:
                following = pool.submit(self.make, *step)
                if pending is not None:
                    yield pending.result()
                pending = following
            if pending is not None:
                yield pending.result()
