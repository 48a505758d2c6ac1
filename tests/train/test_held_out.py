"""When held-out losses are measured, and what they decide."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from sftmix.confidence.scoring import Scores
from sftmix.config.schema import CheckpointConfig, TrainConfig
from sftmix.pipeline.context import ALONE
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.held_out import HeldOutLosses, steps_of

STEPS = [(epoch, unit, unit + 1) for epoch in range(3) for unit in range(4)]


def losses_of(values, **settings):
    """Returns the losses of a model whose held-out loss takes these values, one after another."""
    values = iter(values)

    def score(title):
        loss = next(values)
        # two examples of other lengths: the loss is that of all tokens, no mean of means
        nll_sum = np.array([loss * 1 - 1, loss * 3 + 1])
        return Scores(nll_sum, np.array([1, 3]), np.array([True, False]), np.zeros((1, 3)))

    settings = TrainConfig(evaluate_every=1, **settings)
    return HeldOutLosses(settings, [(0, n, n + 1) for n in range(100)], score)


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (None, []),
        ("epoch", [4, 8, 12]),
        (5, [5, 10, 12]),
        (6, [6, 12]),
        (1, list(range(1, 13))),
        (99, [12]),
    ],
)
def test_when_the_loss_is_measured(every, expected):
    assert steps_of(every, STEPS) == expected


@pytest.mark.parametrize(
    ("values", "patience", "best", "stops_after"),
    [
        ([3, 2, 1, 2, 1.5, 0.5], 2, 3, 5),
        ([3, 2, 1, 2, 0.9, 1, 1, 1], 3, 5, 8),
        ([1, 1, 1], 2, 1, 3),  # an equal loss is no lower one
        ([math.nan, 5, math.nan, 4, 6], 2, 4, None),
        ([math.nan, math.inf, math.nan], 2, 1, 3),
        ([2, 3, 4, 5], None, 1, None),
    ],
)
def test_the_lowest_loss_is_the_best_and_patience_ends(values, patience, best, stops_after):
    losses = losses_of(values, keep_best=True, patience=patience)
    ended = None
    for step in range(1, len(values) + 1):
        measured = losses.measure(step)
        assert measured.is_best == (losses.best_step == step)
        assert measured.loss == pytest.approx(values[step - 1], nan_ok=True)
        assert measured.exact_match == 0.5
        if losses.is_over:
            ended = step
            break
    assert (losses.best_step, ended) == (best, stops_after)


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_resumed_training_decides_as_an_undisturbed_one(cut):
    values = [math.nan, 3, 2, 4, 2.5, 2.2]
    whole, first = (losses_of(values, patience=3) for _ in range(2))
    for step in range(1, 7):
        whole.measure(step)
    for step in range(1, cut + 1):
        first.measure(step)
    numbers, arrays = first.progress()
    saved = json.loads(json.dumps([numbers, numbers]))
    second = losses_of(values[cut:], patience=3)
    second.restore(cut, saved, arrays)
    for step in range(cut + 1, 7):
        second.measure(step)
    assert whole.is_over and second.is_over
    assert second.progress() == whole.progress()


@pytest.mark.parametrize(
    ("states", "pending", "expected"),
    [
        ([8, 4], None, [3, 6, 9]),
        ([8], None, [6, 9]),
        ([2], None, [9]),
        ([], None, [9]),
        ([8], 4, [3, 6, 9]),
        ([9, 12], None, [9]),
    ],
)
def test_a_kept_model_stays_while_a_state_needs_it(tmp_path, states, pending, expected):
    kept = tmp_path / "best"
    for step in (3, 6, 9):
        (kept / f"step_{step:06d}" / "model").mkdir(parents=True)
    identity = {"fingerprint": "", "settings": {}, "inputs": {}}
    checkpoints = TrainingCheckpoints(
        ALONE, tmp_path / "checkpoints", kept, CheckpointConfig(), None, **identity
    )
    for step in states:
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    if pending is not None:
        checkpoints._pending = SimpleNamespace(step=pending)
    checkpoints.remove_outdated(kept, 9)
    assert sorted(path.name for path in kept.iterdir()) == [f"step_{n:06d}" for n in expected]
