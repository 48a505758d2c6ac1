"""Batches made ahead by a thread are those made in turn, and an error in the thread is one of the
step."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from sftmix.batches.ahead import BatchMaker
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching

LENGTHS = np.random.default_rng(0).integers(3, 30, 24)


class Examples:
    num_tokens, num_response_tokens = LENGTHS, LENGTHS // 3 + 1

    def images(self, indices):
        return None

    def tokens(self, index):
        length = int(LENGTHS[index])
        mask = np.arange(length) >= length - int(self.num_response_tokens[index])
        return np.full(length, index, dtype=np.int32), mask


def maker(**changes):
    parts = np.random.default_rng(1).permutation(24)
    by_part = {CONFIDENT: parts[:12], UNCONFIDENT: parts[12:], MIDDLE: parts[:0]}
    matching = Matching(*(by_part[p] for p in (CONFIDENT, UNCONFIDENT, MIDDLE)), seed=0, alpha=0.5)
    options = {
        "micro_batch_tokens": 60,
        "num_ranks": 2,
        "rank": 1,
        "packs": True,
        "square_share": 0.01,
        "pad_id": 0,
        "mixes_inputs": False,
    }
    return BatchMaker(Examples(), matching, **{**options, **changes})


STEPS = [(epoch, start, start + 3) for epoch in (0, 1) for start in (0, 3, 6, 9)]


def test_batches_made_ahead_are_those_made_in_turn():
    making = maker()
    with closing(making.ahead(STEPS)) as batches:
        for step, made in zip(STEPS, batches, strict=True):
            expected = making.make(*step)
            assert made.counts == expected.counts and made.balance == expected.balance
            assert len(made.micro_batches) == len(expected.micro_batches)
            for ours, theirs in zip(made.micro_batches, expected.micro_batches, strict=True):
                assert torch.equal(ours.input_ids, theirs.input_ids)
                assert torch.equal(ours.rows, theirs.rows) and ours.indices == theirs.indices


def test_both_ranks_together_have_every_example_once():
    seen = [
        index
        for rank in (0, 1)
        for made in maker(rank=rank).ahead(STEPS[:4])
        for batch in made.micro_batches
        for index in batch.indices
    ]
    assert sorted(seen) == list(range(24))


def test_one_step_is_made_while_the_one_before_it_is_trained():
    started = [threading.Event() for _ in STEPS]

    making = maker()
    made = []

    def make(*step):
        made.append(step)
        started[STEPS.index(step)].set()
        return making.make(*step)

    watched = replace(making)
    object.__setattr__(watched, "make", make)
    with closing(watched.ahead(STEPS)) as batches:
        next(batches)
        assert started[1].wait(10)  # without asking for it
        assert made == STEPS[:2]  # and no more
        next(batches)
        assert started[2].wait(10) and made == STEPS[:3]


def test_an_error_of_the_thread_is_one_of_its_step_and_nothing_is_left_running():
    class Broken(Examples):
        def tokens(self, index):
            raise OSError("the file is gone")

    batches = replace(maker(), examples=Broken()).ahead(STEPS)
    with pytest.raises(OSError, match="the file is gone"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_closing_ends_the_thread():
    batches = maker().ahead(STEPS)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
