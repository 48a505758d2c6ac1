"""Plans: what is traced against formulas and other traces, what is scaled, and the command."""

import json
from collections import Counter

import numpy as np
import pytest
from planned import config_of
from processes import ROOT

from sftmix.cli import main
from sftmix.config.reader import load_config
from sftmix.engine.counting import Collective, Counted, Part, Peak, Product
from sftmix.errors import ConfigError, SftmixError
from sftmix.planning import calibration, traces
from sftmix.planning.command import gpu_counts
from sftmix.planning.errors_measured import ERRORS
from sftmix.planning.hardware import SUSTAINED, as_json, find, gpu
from sftmix.planning.plan import make_plan
from sftmix.planning.states import Need
from sftmix.planning.step import Load, Step
from sftmix.planning.timing import collective_seconds, product_seconds, seconds_of
from sftmix.planning.workload import Data, data_of, workload

pytestmark = pytest.mark.recipe  # traces are processes of their own


def states(step):
    """Returns the bytes that stay from step to step."""
    items = step.memory(Load(1000, 500, 250_000))["optimiser"]
    return {name: items[name] for name in ("weights", "master weights", "moments", "gradients")}


def test_the_traced_states_are_those_of_the_formula(zero):
    """18 bytes a parameter over the ranks: found without a trace by `Need`."""
    config = config_of(zero)
    trace = traces.trace_step(config, world_size=2, max_tokens=1000)
    need = Need(config, 2, 2)
    assert trace.num_parameters == need.num_parameters > 100_000
    found = sum(states(Step(trace, 2, 3)).values())
    assert found == pytest.approx(need.states_per_rank + need.weights_per_rank, rel=0.01)


def test_a_larger_world_follows_from_a_smaller_one(zero):
    config = config_of(zero)
    small, large = (traces.trace_step(config, world_size=size, max_tokens=1000) for size in (2, 16))
    scaled, direct = Step(small, 16, 3), Step(large, 16, 3)
    for name, size in states(direct).items():
        # every rank pads its shards
        assert states(scaled)[name] == pytest.approx(size, rel=0.03), name
    load = Load(1000, 500, 250_000)
    ours, theirs = scaled.work(load, 2), direct.work(load, 2)
    for phase in ("forward", "backward"):
        assert dict(ours[phase].calls) == dict(theirs[phase].calls)
        assert sum(ours[phase].sent.values()) == pytest.approx(
            sum(theirs[phase].sent.values()), rel=0.01
        )


def test_another_micro_batch_follows_from_the_traced_one(zero):
    config = config_of(zero)
    large, small = (
        traces.trace_step(config, world_size=2, max_tokens=size) for size in (8192, 2000)
    )
    length = small.tokens / 2
    load = Load(small.tokens, small.responses, 2 * length**2)
    scaled, direct = Step(large, 2, 3), Step(small, 2, 3)
    for phase, items in direct.memory(load).items():
        assert sum(scaled.memory(load)[phase].values()) == pytest.approx(
            sum(items.values()), rel=0.05
        )
    ours, theirs = scaled.work(load, 1), direct.work(load, 1)
    for phase in ours:
        assert ours[phase].flops == pytest.approx(theirs[phase].flops, rel=0.01)
        assert ours[phase].moved == pytest.approx(theirs[phase].moved, rel=0.02)


def test_a_deep_model_follows_from_two_shallower_ones(zero, monkeypatch):
    monkeypatch.setattr(traces, "DEEPEST", 5)
    monkeypatch.setattr(traces, "SHALLOW", (2, 4))
    config = config_of(zero, layers=8)
    found = traces.trace_of(config, world_size=2, max_tokens=1000)
    whole = traces.trace_step(config, world_size=2, max_tokens=1000)
    assert found.num_parameters == whole.num_parameters
    for name in ("products", "sent"):
        ours, theirs = (Counter(getattr(trace.one, name)) for trace in (found, whole))
        assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=0.02)
    for phase in ("forward", "backward", "optimiser"):
        assert found.one.peaks[phase].total == pytest.approx(whole.one.peaks[phase].total, rel=0.02)


def test_a_trace_is_made_once(zero, monkeypatch):
    config = config_of(zero)
    first = traces.trace_step(config, world_size=2, max_tokens=1000)

    def refuse(*_, **__):
        raise AssertionError("a kept trace was made again")

    monkeypatch.setattr(traces, "start_python", refuse)
    again = traces.trace_step(config, world_size=2, max_tokens=1000)
    assert again == first
    with pytest.raises(AssertionError):  # what decides a trace is part of its name
        traces.trace_step(
            config_of(zero, "engine.activation_checkpointing=true"), world_size=2, max_tokens=1000
        )


def test_a_step_that_cannot_be_traced_says_why(zero):
    config = config_of(zero, "model.lora={target_modules: [nothing]}")
    with pytest.raises(SftmixError, match="cannot be traced: .*nothing"):
        traces.trace_step(config, world_size=2, max_tokens=1000)


def test_a_plan_has_all_of_it(zero, capsys, tmp_path):
    arguments = [
        "plan",
        "quickstart",
        f"engine.deepspeed={zero}",
        "engine.precision=bf16",
        f"run.dir={tmp_path / 'run'}",
        "--gpus",
        "2",
        "--price",
        "3",
    ]
    assert main([*arguments, "--to", str(tmp_path / "plan")]) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown and "target (SFTMix)" in shown and "error" in shown
    page = (tmp_path / "plan/index.html").read_text()
    assert "<svg" in page and "<script" not in page and 'src="http' not in page
    plan = json.loads((tmp_path / "plan/plan.json").read_text())["plans"][0]
    names = [stage["name"].split(" ")[0] for stage in plan["stages"]]
    assert names == ["reference", "scoring", "baseline", "target"]
    for stage in plan["stages"]:
        low, middle, high = stage["hours"]
        assert 0 < low <= middle <= high
    assert plan["price"][1] == pytest.approx(3 * 2 * plan["hours"][1])
    assert plan["memory"]["total"] == pytest.approx(sum(plan["memory"]["items"].values()))


def test_what_does_not_fit_gets_settings_that_do(zero, tmp_path, capsys):
    tiny = {**vars(gpu("H100", interconnect=100, gpus_per_node=8)), "memory": 3.0e9}
    file = tmp_path / "gpu.json"
    file.write_text(as_json(type(gpu("H100", interconnect=1, gpus_per_node=8))(**tiny), {}))
    arguments = ["plan", "quickstart", f"engine.deepspeed={zero}", "engine.precision=bf16"]
    arguments += ["train.batch_size=512", "train.micro_batch_tokens=262144", "--tokens", "2000"]
    arguments += ["data.max_length=4000", "--gpus", "2", "--gpu", str(file), "--json"]
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["plans"][0]["fits"]
    fixes = found["settings_that_fit"]
    assert any(fix["settings"].startswith("train.micro_batch_tokens=") for fix in fixes)
    assert [fix["hours"] for fix in fixes] == sorted(fix["hours"] for fix in fixes)
    assert all(fix["memory"] <= 0.95 * 3.0e9 for fix in fixes)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("gpus=8,16,...,128", [8, 16, 32, 64, 128]),
        ("gpus=4", [4]),
        ("gpus=1,...,5", [1, 2, 4, 5]),
    ],
)
def test_a_sweep_doubles_between_its_numbers(text, counts):
    assert gpu_counts(text) == counts


@pytest.mark.parametrize("text", ["8,16", "gpus=", "gpus=8,...", "gpus=16,8", "gpus=0,8"])
def test_a_wrong_sweep_is_refused(text):
    with pytest.raises(ConfigError, match="expected gpus=8,16,...,1024"):
        gpu_counts(text)


def test_an_unknown_gpu_names_those_that_are_known(tmp_path):
    with pytest.raises(ConfigError, match="known are H100"):
        find("H1000", interconnect=100, gpus_per_node=8)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="--calibrate"):
        find(str(tmp_path / "x.json"), interconnect=100, gpus_per_node=8)


def test_the_package_knows_its_own_models():
    config = load_config("recipes/qwen2.5-14b-alpaca")
    known = traces.with_known_architecture(config.model)
    assert known.path is None and known.architecture["num_hidden_layers"] == 48


def equal_data(count=64, tokens=100):
    lengths = np.full(count, tokens)
    return Data(lengths, lengths // 2, count, "given")


def train_of(**update):
    return load_config("quickstart").train.model_copy(update=update)


def test_a_workload_counts_what_ranks_do():
    """64 equal examples, 16 a step, pairs of 200 tokens: on 4 ranks 2 pairs each, 400 tokens."""
    train = train_of(batch_size=16, micro_batch_tokens=400, epochs=3)
    settings = {"paired": True, "packs": True, "square_share": 0.0, "seed": 0}
    found = workload(equal_data(), train, num_ranks=4, **settings)
    assert (found.num_steps, found.num_micro_batches, found.idle_ranks) == (12, 1, 0)
    assert found.load == Load(400, 200, 4 * 100**2) and found.real_tokens == 1600
    assert found.useful_share == 1
    crowded = workload(equal_data(), train, num_ranks=16, **settings)
    assert crowded.idle_ranks == 8 and crowded.useful_share == 0.5


def test_a_padded_workload_counts_the_padding():
    """One micro-batch of 64 examples, half of 50 tokens and half of 150."""
    lengths = np.repeat([50, 150], 32)
    data = Data(lengths, lengths // 2, 64, "given")
    train = train_of(batch_size=64, micro_batch_tokens=10**6)
    settings = {"num_ranks": 1, "paired": True, "square_share": 0.0, "seed": 0}
    packed = workload(data, train, packs=True, **settings)
    padded = workload(data, train, packs=False, **settings)
    assert packed.load == Load(6400, 3200, 32 * (50**2 + 150**2)) and packed.useful_share == 1
    assert padded.load == Load(64 * 150, 3200, 64 * 150**2)
    assert padded.useful_share == pytest.approx(2 / 3)
    for name in ("real_tokens", "real_squares", "responses"):
        assert getattr(padded, name) == getattr(packed, name)


def test_lengths_that_are_assumed_are_said(tmp_path):
    config = load_config("recipes/llama3.1-8b-alpaca", [f"run.dir={tmp_path}"])
    found = data_of(config, examples=None, tokens=None)
    assert "published" in found.source and "assumed" in found.source
    given = data_of(config, examples=1000, tokens=50.0)
    assert given.num_examples == 980 and given.num_tokens.mean() == pytest.approx(50, rel=0.1)


def test_a_ring_sends_each_byte_once_or_twice():
    """16 GPUs on two nodes: half of the bytes cross the network, 7 of 8 the links."""
    machine = gpu("H100", interconnect=100, gpus_per_node=8)
    size = 8e9
    gather = collective_seconds(Collective("forward", "allgather_base", 16), 0, size, machine)
    assert gather == pytest.approx(max(size / 2 / machine.network, size * 7 / 8 / machine.link))
    summed = collective_seconds(Collective("backward", "allreduce", 16), 0, size, machine)
    assert summed == pytest.approx(2 * gather)
    alone = collective_seconds(Collective("forward", "allgather_base", 8), 0, size, machine)
    assert alone == pytest.approx(size * 7 / 8 / machine.link)


def test_a_product_is_bound_by_arithmetic_or_by_memory():
    machine = gpu("H100", interconnect=100, gpus_per_node=8)
    large = Product("forward", "product", 8192, 8192, 8192, 2)
    assert product_seconds(large, machine) == pytest.approx(2 * 8192**3 / 798e12, rel=0.02)
    thin = Product("forward", "product", 1, 8192, 8192, 2)
    assert product_seconds(thin, machine) > 8192**2 * 2 / 3.1e12


def synthetic_step(draw):
    """Returns a step as `measure_worker` does, of made-up work."""
    counted = Counted()
    size = int(draw.integers(100, 1000))
    counted.products[Product("forward", "product", size, 300, 300, 4)] = int(draw.integers(1, 90))
    counted.products[Product("forward", "attention", size, size, 300, 4)] = 5
    counted.moved[Part("forward", "activations")] = float(draw.integers(1e6, 1e9))
    counted.moved[Part("optimiser", "temporaries")] = float(draw.integers(1e6, 1e9))
    counted.operations["forward"] = int(draw.integers(100, 5000))
    counted.hooks["forward"] = int(draw.integers(1, 300))
    kind = Collective("forward", "allgather_base", 2)
    counted.calls[kind] = int(draw.integers(1, 300))
    counted.sent[kind] = int(draw.integers(1e5, 1e8))
    counted.peaks["forward"] = Peak(1, {})
    return counted


def test_a_calibration_finds_the_rates_behind_the_seconds():
    draw = np.random.default_rng(3)
    rates = np.array([1e-11, 3e-11, 2e-10, 4e-10, 5e-6, 1e-4, 1e-9, 2e-4])
    steps = []
    for _ in range(12):
        counted = [synthetic_step(draw) for _ in range(2)]
        seconds = [[float(calibration.amounts(each) @ rates)] * 3 for each in counted]
        steps.append(
            {
                "one": counted[0].as_json(),
                "two": counted[1].as_json(),
                "seconds": dict(zip(("one", "two"), seconds, strict=True)),
                "product_flops": [1e11],
            }
        )
    found = calibration.fit(steps, num_ranks=2)
    ours = [1 / found.attention_flops, 1 / found.moved, 1 / found.updated]
    ours += [found.operation_seconds, found.hook_seconds, 1 / found.link, found.call_seconds]
    assert ours == pytest.approx(list(rates[1:]), rel=1e-3)


def test_seconds_that_scatter_do_not_make_a_calibration_fast():
    """Half of its own steps take longer than predicted."""
    draw = np.random.default_rng(4)
    rates = np.array([1e-11, 3e-11, 2e-10, 4e-10, 5e-6, 1e-4, 1e-9, 2e-4])
    steps, table, target = [], [], []
    for _ in range(16):
        counted = [synthetic_step(draw) for _ in range(2)]
        rows = [calibration.amounts(each) for each in counted]
        seconds = [float(row @ rates) * np.exp(0.3 * draw.standard_normal()) for row in rows]
        table += rows
        target += seconds
        step = {"one": counted[0].as_json(), "two": counted[1].as_json(), "product_flops": [1e11]}
        step["seconds"] = {name: [s] for name, s in zip(("one", "two"), seconds, strict=True)}
        steps.append(step)
    found = calibration.fit(steps, num_ranks=2)
    ours = [1 / found.product_flops, 1 / found.attention_flops, 1 / found.moved, 1 / found.updated]
    ours += [found.operation_seconds, found.hook_seconds, 1 / found.link, found.call_seconds]
    predicted = np.array(table) @ np.array(ours)
    assert np.median(np.array(target) / predicted) == pytest.approx(1)


def test_seconds_of_a_calibrated_machine_are_what_was_fitted(zero):
    """The model of time and the fit count the same things."""
    config = config_of(zero)
    trace = traces.trace_step(config, world_size=2, max_tokens=1000)
    machine = find_calibrated()
    length = trace.tokens // 2
    load = Load(trace.tokens, trace.responses, 2 * length**2)
    ours = seconds_of(Step(trace, 2, 3).work(load, 1), machine).expected
    rates = [1 / machine.product_flops, 1 / machine.attention_flops, 1 / machine.moved]
    rates += [1 / machine.updated, machine.operation_seconds, machine.hook_seconds]
    rates += [1 / machine.link, machine.call_seconds]
    assert ours == pytest.approx(float(calibration.amounts(trace.one) @ np.array(rates)), rel=1e-6)


def find_calibrated():
    counted = synthetic_step(np.random.default_rng(0))
    steps = [
        {
            "one": counted.as_json(),
            "two": counted.as_json(),
            "seconds": {"one": [1.0] * 3, "two": [1.0] * 3},
            "product_flops": [1e12],
        }
    ]
    return calibration.fit(steps, num_ranks=2)


def test_the_plan_of_one_gpu_sends_nothing(zero, tmp_path):
    config = config_of(zero, f"run.dir={tmp_path}")
    machine = gpu("H100", interconnect=100, gpus_per_node=8)
    found = make_plan(config, machine, num_ranks=1, data=equal_data())
    assert found.bytes_within == found.bytes_between == 0


def test_the_stated_errors_are_those_of_the_benchmark(monkeypatch):
    """The lines that every plan prints, and the table of docs/planning.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import planner
    import planner_published

    names = ("planner_cpu_202611",)
    files = [ROOT / f"benchmarks/results/{name}.json" for name in names]
    contents = [json.loads(file.read_text()) for file in files]
    page = (ROOT / "docs/planning.md").read_text()
    assert "\n".join(planner.table(contents)) in page
    published = json.loads((ROOT / "benchmarks/results/planner_published.json").read_text())
    assert "\n".join(planner_published.table(published)) in page
    expected = [*planner.sentences(contents), planner_published.sentence(published)]
    assert list(ERRORS) == expected
    found = published["summary"]
    other = found["without_itself"]
    said = (
        f"{found['within']} of {found['of']} are within {found['target']:.0%}, the median error is"
        f" {found['median']:.0%}, the largest {found['largest']:.0%}; with the number fitted to all"
        f" other rows {other['within']}, {other['median']:.0%} and {other['largest']:.0%}."
    )
    assert said in " ".join(page.split())
    assert f"reach {SUSTAINED:.0%} of the rates" in page and found["used"] == SUSTAINED
    assert pytest.approx(found["fitted"], abs=0.015) == SUSTAINED
