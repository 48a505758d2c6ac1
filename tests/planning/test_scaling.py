"""Scaling studies: their points, and what they say."""

import json

import pytest
from planned import SIZES, config_of

from sftmix.cli import main
from sftmix.config.schema import Config
from sftmix.engine.loading import hf_config
from sftmix.errors import ConfigError
from sftmix.planning import scaling
from sftmix.planning.plan import step_of
from sftmix.planning.scaling import ScaleStudy, load_scale_study, share_of
from sftmix.planning.scaling_tables import Point, answers, figures_of, table_of
from sftmix.planning.step import Load

pytestmark = pytest.mark.recipe  # traces are processes of their own


def test_a_scaling_study_has_a_point_for_each(zero, tmp_path, capsys):
    """Weak: all ranks work, and ZeRO-3 sends the same, so a slower network is slower from two nodes
    on. Strong: ranks beyond the pairs of a step are idle."""
    architecture = json.dumps({**SIZES, "num_hidden_layers": 2})
    overrides = [f"model.architecture={architecture}", "engine.precision=bf16"]
    overrides += [f"engine.deepspeed={zero}"]
    scale = {
        "dir": str(tmp_path / "weak"),
        "configs": ["quickstart"],
        "layouts": {"small": overrides},
        "gpus": "4,...,32",
        "interconnect": [0.01, 1000],
    }
    (tmp_path / "weak.yaml").write_text(json.dumps({"scale": scale}))
    assert main(["scale", str(tmp_path / "weak.yaml")]) == 0
    assert "all points are simulated" in capsys.readouterr().out
    points = json.loads((tmp_path / "weak/points.json").read_text())["points"]
    assert len(points) == 8 and not any(point["idle_gpus"] for point in points)
    slow, fast = points[:4], points[4:]
    for a, b in zip(slow, fast, strict=True):
        assert a["seconds"] > 2 * b["seconds"] if a["gpus"] > 8 else a["seconds"] == b["seconds"]
    rows = (tmp_path / "weak/points.csv").read_text().splitlines()
    assert len(rows) == 9 and rows[0].startswith("config,layout,tokens,interconnect,gpus")
    scale |= {"dir": str(tmp_path / "strong"), "scaling": "strong", "tokens": [32768]}
    (tmp_path / "strong.yaml").write_text(json.dumps({"scale": scale}))
    assert main(["scale", str(tmp_path / "strong.yaml"), "scale.interconnect=[1000]"]) == 0
    points = json.loads((tmp_path / "strong/points.json").read_text())["points"]
    # 32,768 tokens are 8 pairs of 4,096
    assert [point["idle_gpus"] for point in points] == [0, 0, 8, 24]


def test_a_scaling_study_says_what_is_wrong(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text("scale:\n  dir: x\n  configs: [quickstart]\n  netwrks: [1]\n")
    assert main(["scale", str(file)]) == 2
    file.write_text("run:\n  dir: x\n")
    with pytest.raises(ConfigError, match="expected one section, `scale`"):
        load_scale_study(str(file), [])
    file.write_text("scale:\n  dir: x\n  configs: [quickstart]\n  gpu: here\n  tokens: [900]\n")
    with pytest.raises(ConfigError, match="one pair: set `tokens`.*to 4096"):
        load_scale_study(str(file), [])


def test_plus_plus_sends_half_of_the_weights_and_a_quarter_of_the_gradients(zero, tmp_path):
    """By the formula of ZeRO++, on the same trace."""
    settings = json.loads(zero.read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    (tmp_path / "plain.json").write_text(json.dumps(settings))
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        settings["zero_optimization"][key] = True
    (tmp_path / "plus.json").write_text(json.dumps(settings))
    load = Load(1000, 500, 250_000)
    plain, plus = (
        step_of(config_of(tmp_path / f"{name}.json"), 4).work(load, 2) for name in ("plain", "plus")
    )

    def sent(work, operation):
        return sum(
            size
            for phase in ("forward", "head", "backward")
            for kind, size in work[phase].sent.items()
            if operation in kind.operation
        )

    assert sent(plus, "allgather") == pytest.approx(sent(plain, "allgather") / 2) != 0
    assert sent(plus, "reduce_scatter") == pytest.approx(sent(plain, "reduce_scatter") / 4) != 0


def test_a_study_of_whole_runs_has_their_hours(zero, tmp_path, capsys):
    architecture = json.dumps({**SIZES, "num_hidden_layers": 2})
    common = [f"model.architecture={architecture}", f"engine.deepspeed={zero}"]
    common += [f"run.dir={tmp_path}"]
    scale = {
        "dir": str(tmp_path / "run"),
        "configs": ["quickstart"],
        "layouts": {
            "own": common,
            "scores at hand": [*common, "confidence.scores=scores.parquet"],
        },
        "gpus": "2,4",
        "scaling": "run",
        "length": 50,
    }
    (tmp_path / "run.yaml").write_text(json.dumps({"scale": scale}))
    assert main(["scale", str(tmp_path / "run.yaml")]) == 0
    said = capsys.readouterr().out
    points = json.loads((tmp_path / "run/points.json").read_text())["points"]
    hours = {(p["layout"], p["gpus"]): p["hours"] for p in points}
    assert hours["own", 2] > hours["scores at hand", 2] > 0
    assert "2 GPUs: scores at hand" in said and "is the fastest that fits" in said


def test_the_measured_step_has_the_model_of_the_simulated_one(tmp_path, monkeypatch):
    study = tmp_path / "study.yaml"
    study.write_text(
        "scale: {dir: x, configs: [alpaca-small], gpus: '2', gpu: here, tokens: [1000],"
        " length: 500}"
    )
    asked = []

    def steps(requests, **_):
        asked.extend(requests)
        return [{"seconds": {"1": [1.0]}, "tokens": 1000} for _ in requests]

    monkeypatch.setattr(scaling, "measured_steps", steps)
    monkeypatch.setattr(scaling, "_simulated", lambda study, config, series, here, n: point(gpus=n))
    points = scaling.points_of(scaling.load_scale_study(str(study), []), {2: None})
    assert [p.kind for p in points] == ["simulated", "measured"]
    (request,) = asked
    model = Config.model_validate(request["config"]).model
    # Of the tokenizer that the config trains; a Llama that says nothing has 32,000.
    assert hf_config(model).vocab_size == 4000


def point(**given):
    usual = {
        "config": "a",
        "layout": "plain",
        "tokens": 8192,
        "interconnect": 100.0,
        "gpus": 8,
        "idle_gpus": 0,
        "seconds": 1.0,
        "fast": 0.9,
        "slow": 1.2,
        "rate": 1000.0,
        "efficiency": 1.0,
        "memory": 2.0**30,
        "fits": True,
        "sending": 0.1,
        "computing": 1.0,
        "hosting": 0.2,
    }
    return Point(**{**usual, **given})


def test_answers_say_how_far_a_line_scales():
    line = [
        point(),
        point(gpus=16, efficiency=0.8),
        point(gpus=32, efficiency=0.7, sending=3.0),
        point(gpus=64, efficiency=0.85, sending=3.0),  # behind the first that does not
        point(gpus=128, efficiency=0.6, sending=3.0),
    ]
    (said,) = answers(line, 2048)
    assert "up to 16; 60% on 128, mostly sending" in said


def test_answers_name_the_fastest_layout_that_fits():
    points = [
        point(layout="slow", rate=900.0),
        point(layout="fast", rate=2000.0, fits=False),
        point(layout="middle", rate=1100.0),
    ]
    assert "8 GPUs: middle with 8,192 tokens, 1,100 tokens/s/GPU" in answers(points, 2048)[0]
    assert "no layout fits" in answers([point(fits=False), point(layout="b", fits=False)], 1)[0]


def test_answers_name_the_fewest_tokens_that_are_enough():
    rates = {1024: 500.0, 4096: 899.0, 8192: 901.0, 32768: 1000.0}
    points = [point(tokens=tokens, rate=rate) for tokens, rate in rates.items()]
    (said,) = answers(points, 512)
    assert "8,192 tokens of a rank, 128 examples of a step, reach 90%" in said


def test_measured_points_stand_beside_their_simulation():
    pair = [point(seconds=1.1), point(kind="measured")]
    assert "simulated 1.1 s, measured 1 s, ratio 1.10" in answers(pair, 512)[-1]
    assert any(", measured" in line for line in table_of(pair))
    ((caption, svg),) = figures_of(pair, "weak")
    assert caption == "a, weak, simulated and measured" and svg.count("measured") >= 1


def test_strong_scaling_divides_the_pairs():
    study = ScaleStudy(
        dir="x",
        configs=["a"],
        scaling="strong",
        tokens=[4000],
        micro_batch_tokens=1000,
        length=500,
    )
    shares = {gpus: share_of(study, 4000, gpus) for gpus in (1, 2, 4, 8)}
    assert {gpus: share[2] for gpus, share in shares.items()} == {1: 4, 2: 2, 4: 1, 8: 1}
    assert all(share[1].tokens == 1000 for share in shares.values())
    assert shares[8][0] == 4
