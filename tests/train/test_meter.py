"""Where a training stage's seconds go, and its tokens per second, on a clock that moves only when
something is done."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sftmix.batches.balance import Balance
from sftmix.batches.cut import StepCounts
from sftmix.cluster.liveness.stopping import StopRequest
from sftmix.config.schema import CheckpointConfig, TrainConfig
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.loss.objective import Objective
from sftmix.loss.requests import LossResult
from sftmix.pairing.matching import singles
from sftmix.storage.checkpoints import CheckpointFolder
from sftmix.train.checkpointing import TrainingCheckpoints
from sftmix.train.log import (
    MIXUP,
    NTP,
    PADDED_RATE,
    REAL_RATE,
    RESPONSE_RATE,
    TRAINING_TIME,
    RunLog,
    read_metrics,
)
from sftmix.train.loop import TrainingRun, train
from sftmix.train.meter import CHECKPOINT, TRAINING, Meter, PartTimer, StepTrace, describe_time
from sftmix.train.plan import TrainingPlan
from sftmix.train.resuming import CheckpointReader

START, STEP, SAVE, EXPORT = 8.0, 0.5, 16.0, 32.0  # seconds; sums of such numbers are exact
# 6 steps an epoch, the last of half the size; lines after steps 3, 6, 9, 12
NUM_EXAMPLES, BATCH, EVERY = 22, 4, 3
REAL, RESPONSE = 5, 2  # tokens of an example
STEPS = 12


class Clock:
    """A clock that stands still. Like a GPU it can have work under way, which `finish` waits
    for."""

    def __init__(self, now):
        self.now = self.started = now
        self.under_way = 0.0

    def __call__(self):
        return self.now

    def finish(self):
        self.now, self.under_way = self.now + self.under_way, 0.0


class LossesOnDevice:
    """A RunLog's losses on a device that computes behind the program's back."""

    def __init__(self, clock, losses):
        self.clock, self.losses = clock, losses

    def __iadd__(self, other):
        self.losses += other
        return self

    def cpu(self):
        self.clock.finish()
        return self.losses

    def tolist(self):
        return self.cpu().tolist()


class Log(RunLog):
    """With a clock of its own, which training moves only once the losses are asked for."""

    def __setattr__(self, name, value):
        if name == "_losses" and isinstance(value, torch.Tensor):
            value = LossesOnDevice(self.meter.clock, value)
        super().__setattr__(name, value)


class Examples:
    num_tokens = np.full(NUM_EXAMPLES, REAL)
    num_response_tokens = np.full(NUM_EXAMPLES, RESPONSE)

    def images(self, indices):
        return None

    def tokens(self, index):
        return np.arange(REAL), np.arange(REAL) >= REAL - RESPONSE


class Killed(Exception):
    pass


class Stage:
    """A training stage of an engine that computes nothing: each attempt begins with `START`
    seconds, takes steps of `STEP`, saves after the steps of `saves`, exports after those of
    `exports`, and is killed after `kill_after`."""

    def __init__(self, folder, *, saves=(), exports=(STEPS,)):
        self.folder, self.saves, self.exports = folder, set(saves), exports
        self.saved = None  # step, JSON
        self.attempts = 0

    def attempt(self, *, kill_after=None):
        self.attempts += 1
        clock = Clock(1000.0 * self.attempts)
        ranks = Ranks(0, 1, 0, torch.device("cpu"))
        meter = Meter(clock)
        clock.now += START
        log = Log(
            "test",
            ranks,
            metrics=self.folder / "metrics.jsonl",
            tensorboard=None,
            every_steps=EVERY,
            has_mixup=True,
            has_router=False,
            meter=meter,
        )
        checkpoints = TrainingCheckpoints(
            ranks,
            self.folder,
            self.folder,
            CheckpointConfig(every_steps=1, every_minutes=None),
            StopRequest(self.folder),
            fingerprint="f",
            settings={},
            inputs={},
        )

        def resume(engine, parts):
            if self.saved is not None:
                parts["log"].restore(self.saved[0], json.loads(self.saved[1]), {})
            return self.saved[0] if self.saved else 0

        def save(engine, step, parts, *, in_background):
            if step in self.saves:
                assert not clock.under_way, "the device was not waited for"
                clock.now += SAVE / 2
                self.saved = step, json.dumps([parts["log"].progress()[0]])
                clock.now += SAVE / 2
            if step == kill_after:
                raise Killed

        def export(step):
            assert not clock.under_way, "the device was not waited for"
            clock.now += EXPORT / 2
            clock.under_way += EXPORT / 2

        def step(learning_rate):
            clock.under_way += STEP
            return 1.0

        def forward_backward(batch, *arguments, **options):
            quarter = torch.tensor(0.25)
            return LossResult(quarter, quarter, quarter, torch.zeros(0), quarter)

        checkpoints.resume, checkpoints._save = resume, save
        engine = SimpleNamespace(
            packs=False,
            flops=SimpleNamespace(square_share=0.0),
            ranks=ranks,
            start_step=lambda **_: None,
            forward_backward=forward_backward,
            step=step,
            was_step_skipped=False,
        )
        plan = TrainingPlan(singles(NUM_EXAMPLES, seed=0), 2, BATCH)
        try:
            train(
                TrainingRun(
                    engine=engine,
                    examples=Examples(),
                    plan=plan,
                    objective=Objective(0.2),
                    seed=0,
                    pad_id=0,
                    trace=StepTrace(None, self.folder / "trace.json", ranks.device),
                    log=log,
                    settings=TrainConfig(micro_batch_tokens=2 * REAL),
                    checkpoint_steps=self.exports,
                    save_checkpoint=export,
                    checkpoints=checkpoints,
                    skipped=SimpleNamespace(add=lambda *_: None, end_step=lambda *_, **__: None),
                )
            )
        except Killed:
            log.finish()
            return None
        clock.finish()
        self.elapsed = clock.now - clock.started
        return log.facts()

    def lines(self):
        """Without the memory, which is that of this process and grows from test to test."""
        lines = read_metrics(self.folder / "metrics.jsonl")
        assert all(line.pop("memory/peak (GiB)") > 0 for line in lines)
        return lines


def check_sums(stage, facts):
    """The lines add up to the facts, and both are what was done."""
    lines = stage.lines()
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert sum(line[TRAINING_TIME] for line in lines) == facts["training_seconds"] == STEPS * STEP
    for key, kind, size in (
        (REAL_RATE, "real", REAL),
        (RESPONSE_RATE, "response", RESPONSE),
        (PADDED_RATE, "padded", REAL),
    ):
        tokens = [line[key] * line[TRAINING_TIME] for line in lines]
        assert tokens == pytest.approx(
            [3 * BATCH * size, (2 * BATCH + NUM_EXAMPLES % BATCH) * size] * 2, rel=1e-12
        )
        assert sum(tokens) == pytest.approx(
            facts[f"{kind}_tokens_per_second"] * facts["training_seconds"], rel=1e-12
        )


@pytest.mark.parametrize("exports", [(12,), (1, 4, 12), (3, 6, 12), tuple(range(1, 13))], ids=str)
@pytest.mark.parametrize("saves", [(), (1,), (2, 3, 7), range(1, 12)], ids=str)
def test_lines_add_up_to_the_totals_wherever_checkpoints_fall(tmp_path, saves, exports):
    stage = Stage(tmp_path, saves=saves, exports=exports)
    facts = stage.attempt()
    check_sums(stage, facts)
    assert facts["checkpoint_seconds"] == len(saves) * SAVE + len(exports) * EXPORT
    assert (
        facts["waited_seconds"]
        == stage.elapsed
        == START + facts["training_seconds"] + facts["checkpoint_seconds"]
    )


# before, at and behind a save, and at the end
@pytest.mark.parametrize(
    "kill_after",
    [
        pytest.param(step, marks=() if step in (1, 5, 6, 11) else pytest.mark.torture)
        for step in range(1, 12)
    ],
)
@pytest.mark.parametrize(
    "saves", [(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (1, 5), (2, 6, 11)], ids=str
)
def test_a_resumed_stage_has_the_lines_and_seconds_of_one_that_was_not_killed(
    tmp_path, saves, kill_after
):
    (tmp_path / "whole").mkdir()
    whole = Stage(tmp_path / "whole", saves=saves, exports=(4, 12))
    expected = whole.attempt()
    (tmp_path / "killed").mkdir()
    stage = Stage(tmp_path / "killed", saves=saves, exports=(4, 12))
    assert stage.attempt(kill_after=kill_after) is None
    is_saved = stage.saved is not None
    facts = stage.attempt()
    check_sums(stage, facts)
    assert stage.lines() == whole.lines()
    # Of the attempt that was killed, what its last saved state knows; of that save itself the first
    # half.
    lost = SAVE / 2 if is_saved else 0.0
    assert facts["checkpoint_seconds"] == expected["checkpoint_seconds"] - lost
    assert facts["waited_seconds"] == expected["waited_seconds"] - lost + (
        START if is_saved else 0.0
    )


def test_a_stage_killed_twice_still_adds_up(tmp_path):
    stage = Stage(tmp_path, saves=range(1, 12))
    stage.attempt(kill_after=4)
    stage.attempt(kill_after=8)
    facts = stage.attempt()
    check_sums(stage, facts)
    assert facts["waited_seconds"] == 3 * START + STEPS * STEP + 11 * SAVE - 2 * SAVE / 2 + EXPORT


def test_what_follows_the_last_step_is_no_training(tmp_path):
    clock, ranks = Clock(0.0), Ranks(0, 1, 0, torch.device("cpu"))
    log = RunLog(
        "test",
        ranks,
        metrics=tmp_path / "m.jsonl",
        tensorboard=None,
        every_steps=2,
        has_mixup=False,
        has_router=False,
        meter=Meter(clock),
    )
    log.start(num_steps=3)
    for step in (1, 2, 3):
        clock.now += 1.0
        log.end_step(
            step,
            counts=StepCounts(4, 0),
            balance=Balance(8.0, 8.0, 8.0),
            lam=np.zeros(0),
            learning_rate=0.1,
            grad_norm=1.0,
            is_skipped=False,
            epoch=0,
        )
        clock.now += 4.0  # the scores of an epoch are gathered, say
    log.finish()
    lines = read_metrics(tmp_path / "m.jsonl")
    assert (
        sum(line[TRAINING_TIME] for line in lines) == log.meter.facts()["training_seconds"] == 11.0
    )
    assert log.meter.facts()["waited_seconds"] == 15.0


def log_of(rank, world_size, folder):
    ranks = Ranks(rank, world_size, 0, torch.device("cpu"))
    return RunLog(
        "test",
        ranks,
        metrics=folder / "m.jsonl",
        tensorboard=None,
        every_steps=2,
        has_mixup=False,
        has_router=False,
    )


def test_other_ranks_share_out_what_was_counted_since_the_last_line(tmp_path):
    rows = []
    for rank in (0, 1):
        log = log_of(rank, 2, tmp_path)
        log.meter.window_tokens = {"real": 10.0 + rank, "response": 4.0, "padded": 16.0}
        log.meter.tokens = {"real": 100.0, "response": 40.0, "padded": 160.0}
        rows.append(log.progress()[0])
    same = log_of(1, 2, tmp_path)
    same.restore(1, rows, {})
    assert same.meter.window_tokens["real"] == 11.0
    for world_size in (1, 3):
        logs = [log_of(rank, world_size, tmp_path) for rank in range(world_size)]
        for log in logs:
            log.restore(1, rows, {})
        assert sum(log.meter.window_tokens["real"] for log in logs) == 21.0
        # totals are of all ranks already
        assert {log.meter.tokens["real"] for log in logs} == {100.0}


def test_seconds_go_back_to_the_activity_before():
    clock = Clock(0.0)
    meter = Meter(clock)
    meter.switch(TRAINING)
    clock.now += 1
    with pytest.raises(ValueError), meter.during(CHECKPOINT):
        clock.now += 2
        raise ValueError
    clock.now += 4
    facts = meter.facts()
    assert (facts["training_seconds"], facts["checkpoint_seconds"], facts["waited_seconds"]) == (
        5,
        2,
        7,
    )
    # no rate where no time has passed
    assert np.isnan(Meter(clock).facts()["real_tokens_per_second"])


def test_the_line_on_the_screen_shows_the_times_apart():
    facts = {"training_seconds": 60.0, "checkpoint_seconds": 30.0, "waited_seconds": 105.0}
    expected = "training 1.00, evaluation {}, checkpoints and exports 0.50, start and end {}"
    # a training of an earlier version did not count evaluation
    assert describe_time(facts) == f"1.75 min: {expected.format('0.00', '0.25')}"
    facts["evaluation_seconds"] = 6.0
    assert describe_time(facts) == f"1.75 min: {expected.format('0.10', '0.15')}"


def test_a_state_with_sums_of_other_names_is_refused(tmp_path, monkeypatch):
    log = log_of(0, 1, tmp_path)
    reader = CheckpointReader(log.ranks, CheckpointFolder(tmp_path, 1), tmp_path, {})
    manifest = SimpleNamespace(
        facts={"numbers": {"log": [[0.0] * 14]}, "world_size": 1}, files={}, commit="abc"
    )
    monkeypatch.setattr(reader, "newest", lambda: 3)
    monkeypatch.setattr(reader, "find_problem", lambda step: None)
    monkeypatch.setattr(reader, "_say_differences", lambda *arguments: None)
    monkeypatch.setattr(reader, "_load", lambda *arguments: None)
    monkeypatch.setattr(CheckpointFolder, "read", lambda folder, step: manifest)
    with pytest.raises(
        ArtifactError, match=r"saved by another version of sftmix \(commit abc\).*--restart"
    ):
        reader.resume(None, {"log": log})


@pytest.mark.parametrize("has_mixup", [True, False])
def test_curves_of_all_runs_have_the_same_tags_and_units_in_their_description(tmp_path, has_mixup):
    curves = {}
    for stage in ("baseline", "sftmix"):
        clock = Clock(0.0)
        ranks = Ranks(0, 1, 0, torch.device("cpu"))
        log = RunLog(
            stage,
            ranks,
            metrics=tmp_path / f"{stage}.jsonl",
            tensorboard=tmp_path / stage,
            every_steps=1,
            has_mixup=has_mixup,
            has_router=True,
            meter=Meter(clock),
        )
        for first, last in ((1, 2), (3, 3)):  # the second goes on with the same curves
            log.start(num_steps=3, after=first - 1)
            for step in range(first, last + 1):
                clock.now += 2.0
                log.meter.window_tokens["real"] = 10.0 * step
                log.end_step(
                    step,
                    counts=StepCounts(8, 3),
                    balance=Balance(30.0, 40.0, 50.0),
                    lam=np.array([0.5]),
                    learning_rate=0.125,
                    grad_norm=2.0,
                    is_skipped=False,
                    epoch=0,
                )
            log.finish()
        events = EventAccumulator(str(tmp_path / stage)).Reload()
        curves[stage] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
        }
        assert [value for _, value in curves[stage]["tokens_per_second/real"]] == [5.0, 10.0, 15.0]
        assert [value for _, value in curves[stage]["ranks/useful"]] == [pytest.approx(0.6)] * 3
        assert [value for _, value in curves[stage]["ranks/slowest"]] == [1.25] * 3
        if has_mixup:
            assert [value for _, value in curves[stage]["mixup/coverage"]] == [0.75] * 3
        described = {tag: events.SummaryMetadata(tag).summary_description for tag in curves[stage]}
        assert (
            "nats per response token" in described["loss/ntp"]
            and "per second of training" in described["tokens_per_second/real"]
        )
        assert all(described.values()) and not [
            tag for tag in described if stage in tag or "nats" in tag or "(" in tag
        ]
        keys = set(read_metrics(tmp_path / f"{stage}.jsonl")[0]) - {"step", "epoch"}
        assert (
            len(keys) == len(described)
            and NTP in keys
            and (MIXUP in keys) == ("loss/mixup" in described) == has_mixup
        )
    for curve in curves.values():
        assert [step for step, value in curve.pop("memory/peak") if value > 0] == [1, 2, 3]
    assert curves["baseline"] == curves["sftmix"] and all(
        [step for step, _ in curve] == [1, 2, 3] for curve in curves["sftmix"].values()
    )


def test_parts_are_timed_and_taken():
    clock = Clock(0.0)
    parts = PartTimer(torch.device("cpu"), clock)
    for part, seconds in (("forward", 2.0), ("head", 0.5), ("forward", 1.0)):
        with parts.during(part):
            clock.now += seconds
    taken = {"forward": 3.0, "head": 0.5, "backward": 0.0, "optimiser": 0.0, "communication": 0.0}
    assert parts.take() == taken
    assert set(parts.take().values()) == {0.0}


def test_a_trace_has_the_operations_of_its_steps_and_no_others(tmp_path, capsys):
    path = tmp_path / "traces" / "train_rank_0000.json"
    trace = StepTrace((2, 3), path, torch.device("cpu"))
    for step, operation in enumerate((torch.sin, torch.cos, torch.tan, torch.exp), start=1):
        trace.begin_step(step)
        operation(torch.ones(3))
        trace.end_step(step, is_last=step == 4)
    names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"aten::cos", "aten::tan"} <= names and not {"aten::sin", "aten::exp"} & names
    assert f"trace of steps 2 to 3: {path}" in capsys.readouterr().out


def test_a_trace_ends_with_the_training(tmp_path):
    trace = StepTrace((2, 9), tmp_path / "trace.json", torch.device("cpu"))
    trace.begin_step(2)
    trace.end_step(2, is_last=True)
    assert (tmp_path / "trace.json").is_file()
