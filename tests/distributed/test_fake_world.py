"""A world that is not there against two real ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import ROOT, environment, run_ranks

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "fake_world_worker.py"
COMMON = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BUCKET = 100_000  # elements; DeepSpeed's own would hide all else


def last_line(output):
    return json.loads(output.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("family", "packing"),
    [("llama", "auto"), pytest.param("qwen3", "off", marks=pytest.mark.torture)],
)
def test_a_fake_world_counts_what_two_ranks_do(tmp_path, family, packing):
    zero = {"stage": 3, "reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 1000}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    config = {
        "base": "quickstart",
        "model": {"architecture": {"model_type": family, **COMMON}},
        "engine": {
            "zero_stage": 3,
            "precision": "bf16",
            "deepspeed": str(tmp_path / "zero.json"),
            "activation_checkpointing": family == "qwen3",
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    real = last_line(run_ranks(WORKER, 2, str(path)))
    command = [sys.executable, str(WORKER), str(path), "2"]
    done = subprocess.run(
        command,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    fake = last_line(done.stdout)
    assert fake["parameters"] == real["parameters"] > 100_000
    assert fake["calls"] == real["calls"] and fake["sent"] == real["sent"]
    assert fake["products"] == real["products"]
    assert sum(fake["moved"].values()) == pytest.approx(sum(real["moved"].values()), rel=0.01)
    assert any("reduce_scatter" in kind for kind in fake["calls"])
    for phase in ("forward", "backward", "optimiser"):
        assert fake["peaks"][phase] == pytest.approx(real["peaks"][phase], rel=0.01)
        for purpose in ("weights", "master weights", "moments", "gradients", "reduce buckets"):
            assert fake["purposes"][phase][purpose] == real["purposes"][phase][purpose] > 0
    # 18 bytes a parameter: weights, master weights, two moments and gradients, halved
    states = sum(
        fake["purposes"]["optimiser"][name]
        for name in ("weights", "master weights", "moments", "gradients")
    )
    assert states == pytest.approx(18 * fake["parameters"] / 2, rel=0.01)
