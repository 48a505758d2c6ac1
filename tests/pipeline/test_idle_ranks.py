"""A batch that is too small for its ranks is said before training, with one that would do."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from sftmix.batches.balance import expected_useful_share
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT, Matching
from sftmix.pipeline.stages.training import ENOUGH, _say_idle

LENGTHS = np.random.default_rng(0).integers(20, 400, 3000)
PARTS = np.random.default_rng(1).permutation(3000)
BY_PART = {CONFIDENT: PARTS[:1500], UNCONFIDENT: PARTS[1500:], MIDDLE: PARTS[:0]}
MATCHING = Matching(*(BY_PART[p] for p in (CONFIDENT, UNCONFIDENT, MIDDLE)), seed=0, alpha=0.5)


def run_of(batch_size, num_ranks):
    return SimpleNamespace(
        engine=SimpleNamespace(
            ranks=SimpleNamespace(world_size=num_ranks),
            packs=True,
            flops=SimpleNamespace(square_share=0.0),
        ),
        plan=SimpleNamespace(matching=MATCHING),
        examples=SimpleNamespace(num_tokens=LENGTHS),
        settings=SimpleNamespace(batch_size=batch_size, micro_batch_tokens=8192),
    )


def share(batch_size, num_ranks):
    return expected_useful_share(
        MATCHING,
        LENGTHS,
        batch_size=batch_size,
        micro_batch_tokens=8192,
        num_ranks=num_ranks,
        packs=True,
        square_share=0.0,
    )


def test_a_larger_batch_is_named_that_keeps_the_ranks_busy(capsys):
    _say_idle(run_of(16, 8))
    said = capsys.readouterr().out
    assert f"train.batch_size=16 keeps 8 ranks busy {share(16, 8):.0%} of the time" in said
    larger = int(re.search(r"train\.batch_size=(\d+) would give", said)[1])
    assert share(larger, 8) >= ENOUGH > share(larger // 2, 8)


def test_a_batch_that_is_large_enough_is_not_spoken_of(capsys):
    assert share(256, 2) > ENOUGH
    _say_idle(run_of(256, 2))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("num_ranks", [2000])
def test_where_no_batch_would_do_that_is_said(capsys, num_ranks):
    _say_idle(run_of(8, num_ranks))
    assert "no batch up to 64 times as large would do" in capsys.readouterr().out
