import warnings

import numpy as np
import pytest
from naive import make_model

from sftmix.config.schema import TrainConfig
from sftmix.engine.engine import enable_activation_checkpointing
from sftmix.pairing.matching import singles
from sftmix.train.plan import TrainingPlan, choose_checkpoint_steps, learning_rate_at


def rates(num_steps, **settings):
    train = TrainConfig(learning_rate=1.0, **settings)
    return np.array(
        [
            learning_rate_at(step, num_steps=num_steps, settings=train)
            for step in range(1, num_steps + 1)
        ]
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 101])
def test_rates_rise_to_the_peak_and_never_after(schedule, num_steps):
    curve = rates(num_steps, schedule=schedule, warmup_ratio=0.1)
    warmup = int(np.ceil(0.1 * num_steps))
    assert curve[warmup - 1] == pytest.approx(1.0) == curve.max() and (curve >= 0).all()
    assert (np.diff(curve[:warmup]) > 0).all() and (np.diff(curve[warmup - 1 :]) <= 0).all()
    if num_steps > warmup:
        # the last step still learns
        assert 0 < curve[-1] <= (1.0 if schedule == "constant" or num_steps - warmup == 1 else 0.6)


def test_without_warm_up_the_first_step_is_on_the_schedule():
    assert rates(4, schedule="linear", warmup_ratio=0.0).tolist() == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_at_half_the_peak_in_the_middle():
    assert rates(100, schedule="cosine", warmup_ratio=0.0)[50] == pytest.approx(0.5)


def plan(epochs, examples=20, batch_size=4):
    return TrainingPlan(singles(examples, seed=0), epochs, batch_size)


@pytest.mark.parametrize(
    ("epochs", "wanted", "expected"),
    [
        (3, None, [5, 10, 15]),  # the end of every epoch
        (1, None, [2, 4, 5]),  # three evenly spaced
        (2, None, [4, 7, 10]),
        (3, 2, [8, 15]),
        (1, 100, [1, 2, 3, 4, 5]),  # not more than there are steps
        (1, 10**20, [1, 2, 3, 4, 5]),
    ],
)
def test_checkpoints_of_the_reference_run(epochs, wanted, expected):
    assert choose_checkpoint_steps(plan(epochs), wanted) == expected


def test_activation_checkpointing_is_switched_on_without_a_warning_of_transformers():
    model, _ = make_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_activation_checkpointing(model)
    layers = model.model.layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert all(
        layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers
    )


def test_an_older_transformers_is_called_by_its_own_name():
    class Old:
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            self.given = gradient_checkpointing_kwargs

    model = Old()
    enable_activation_checkpointing(model)
    assert model.given == {"use_reentrant": False}
