"""Held-out losses during a training, on real ranks: their value, what they choose, and kills."""

import hashlib
import json
import shutil

import pytest
from by_transformers import held_out_tokens
from processes import sftmix, sftmix_on_ranks
from tiny import TINY

from sftmix.train.log import HELD_OUT, HELD_OUT_EXACT, NTP, read_metrics

pytestmark = pytest.mark.distributed
QUICKSTART = "configs/quickstart.yaml"
# The learning rate grows until the model diverges, so that the best step is an early one, and
# patience ends the training, on every CPU.
OPTIONS = [
    *TINY,
    "train.epochs=4",
    "train.learning_rate=4.0",
    "train.warmup_ratio=1.0",
    "train.evaluate_every=3",
    "train.keep_best=true",
    "train.patience=3",
    "reference.train.epochs=1",
    "reference.train.learning_rate=0.001",
    "reference.train.warmup_ratio=0.1",
    "baseline.enabled=false",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=1",
    "limits.silent_seconds=5",
]


def train(folder, num_ranks, *more, **options):
    return sftmix_on_ranks(
        num_ranks, "train", QUICKSTART, *OPTIONS, f"run.dir={folder}", *more, **options
    )


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Returns a run folder in which everything but the training is finished."""
    folder = tmp_path_factory.mktemp("held_out") / "run"
    sftmix("split", QUICKSTART, *OPTIONS, f"run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def trained(split):
    """Returns the run folder of a training on two ranks that nothing disturbed."""
    folder = split.parent / "trained"
    shutil.copytree(split, folder)
    train(folder, 2)
    return folder


# rounding does not grow with so small a learning rate, so losses of other ranks can be compared
SLOW = ["train.learning_rate=0.001", "train.warmup_ratio=0.1", "train.patience="]


@pytest.fixture(scope="module")
def trained_slowly(split):
    folder = split.parent / "slow"
    shutil.copytree(split, folder)
    train(folder, 2, *SLOW)
    return folder


def measured(folder):
    lines = read_metrics(folder / "sftmix" / "metrics.jsonl")
    return {line["step"]: line for line in lines if HELD_OUT in line}


def digest_of(folder):
    weights = (folder / "sftmix" / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def facts_of(folder):
    return json.loads((folder / "sftmix" / "manifest.json").read_text())["facts"]


def test_the_loss_is_that_of_the_kept_model_by_transformers(trained):
    lines, facts = measured(trained), facts_of(trained)
    best = facts["best_step"]
    assert lines[best][HELD_OUT] == min(line[HELD_OUT] for line in lines.values())
    # else the test would not tell the best model from the last one, or patience from no patience
    assert best < facts["num_steps"] < facts["num_planned_steps"] and len(lines) > 2
    total, num_exact, num_tokens, num_examples = 0.0, 0, 0, 0
    for log_p, labels in held_out_tokens(trained / "sftmix" / "model", trained / "data"):
        total -= log_p.gather(1, labels[:, None]).sum().item()
        num_exact += bool((log_p.argmax(-1) == labels).all())
        num_tokens += len(labels)
        num_examples += 1
    assert lines[best][HELD_OUT] == pytest.approx(total / num_tokens, rel=1e-5)
    assert lines[best][HELD_OUT_EXACT] == num_exact / num_examples
    assert sorted(path.name for path in (trained / "sftmix").iterdir()) == [
        "manifest.json",
        "metrics.jsonl",
        "model",
    ]


@pytest.mark.parametrize(
    ("num_ranks", "zero_stage"),
    [
        (3, 3),
        *(
            pytest.param(*layout, marks=pytest.mark.torture)
            for layout in ((1, 0), (1, 3), (2, 0), (2, 1))
        ),
    ],
)
def test_other_ranks_and_stages_measure_the_same(
    split, trained_slowly, tmp_path, num_ranks, zero_stage
):
    folder = tmp_path / "run"
    shutil.copytree(split, folder)
    train(folder, num_ranks, *SLOW, f"engine.zero_stage={zero_stage}")
    ours, theirs = measured(folder), measured(trained_slowly)
    assert list(ours) == list(theirs) and len(ours) > 5
    for step, line in ours.items():
        assert line[HELD_OUT] == pytest.approx(theirs[step][HELD_OUT], rel=1e-4)
        assert line[NTP] == pytest.approx(theirs[step][NTP], rel=1e-4)


def test_measuring_changes_nothing_else(split, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(split, folder)
    off = ["train.evaluate_every=", "train.keep_best=false", "train.patience="]
    train(folder, 2, *off)
    without = read_metrics(folder / "sftmix" / "metrics.jsonl")
    lines = read_metrics(trained / "sftmix" / "metrics.jsonl")
    assert not any(HELD_OUT in line for line in without) and len(without) > len(lines)
    for a, b in zip(lines, without[: len(lines)], strict=True):
        assert (a["step"], a[NTP], a["grad_norm"]) == (b["step"], b[NTP], b["grad_norm"])


@pytest.mark.parametrize(
    "step", [8, *(pytest.param(step, marks=pytest.mark.torture) for step in (4, 10))]
)
def test_a_killed_training_goes_on_bit_for_bit(split, trained, tmp_path, step):
    folder = tmp_path / "run"
    shutil.copytree(split, folder)
    done = train(folder, 2, check=False, fault=f"train.step:1:{step}:kill9")
    assert done.returncode != 0
    kept = folder / "work" / "train" / "kept" / "best"
    assert len(list(kept.iterdir())) <= 2  # that of the state, and a newer one
    train(folder, 2)
    ours, theirs = measured(folder), measured(trained)
    assert list(ours) == list(theirs)
    assert [line[HELD_OUT] for line in ours.values()] == [
        line[HELD_OUT] for line in theirs.values()
    ]
    assert digest_of(folder) == digest_of(trained)
    names = ("best_step", "num_steps", "num_planned_steps")
    assert [facts_of(folder)[name] for name in names] == [facts_of(trained)[name] for name in names]
