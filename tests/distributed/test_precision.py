"""A run computes in the precision of its config, whatever DeepSpeed believes of the accelerator."""

from pathlib import Path

import pytest
from pairs import results_of

WORKER = Path(__file__).parent / "precision_worker.py"
NAMES = {"fp32": "float32", "bf16": "bfloat16"}
ACCELERATORS = ["None True", "None False", "True True"]  # fp16, bf16
STAGES = [("fp32", 0), *((precision, stage) for precision in NAMES for stage in (1, 2, 3))]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[1, 2])
def results(request, tmp_path_factory):
    return results_of(WORKER, tmp_path_factory.mktemp("precision"), (request.param,))


def is_refused(accelerator, precision):
    return accelerator == "None False" and precision == "bf16"


@pytest.mark.parametrize(("precision", "stage"), STAGES)
@pytest.mark.parametrize(
    ("accelerator", "kind"), [*((name, "llama") for name in ACCELERATORS), ("None True", "gemma")]
)
def test_weights_states_and_exports_have_the_dtype_of_the_config(
    results, accelerator, precision, stage, kind
):
    found = results[f"{accelerator} {precision} {stage} {kind}"]
    if is_refused(accelerator, precision):
        assert "engine.precision is bf16, which" in found and "Use fp32" in found
        return
    name = NAMES[precision]
    # Weights as asked for; rotary frequencies and the optimiser's moments stay in float32.
    assert found == [precision, name, "float32", "float32", [f"torch.{name}"], name]


@pytest.mark.parametrize("precision", list(NAMES))
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_scoring_model_has_the_dtype_of_the_config(results, accelerator, precision):
    found = results[f"{accelerator} {precision} score"]
    assert "which" in found if is_refused(accelerator, precision) else found == precision


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("precision", list(NAMES))
def test_adapters_and_the_merged_model_have_the_dtype_of_the_config(results, precision, stage):
    name = NAMES[precision]
    expected = [precision, name, "float32", "float32", [f"torch.{name}"], name]
    assert results[f"lora {precision} {stage}"] == expected


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("built", ["the weight", "is bfloat16 after DeepSpeed has started", "asks for float32"]),
        ("states", ["the optimiser state exp_avg of group 0 is bfloat16 after the first step"]),
        ("loaded", ["the optimiser state exp_avg_sq of group 0 is bfloat16 after", "was loaded"]),
        ("loaded universal", ["exp_avg_sq of group 0 is bfloat16 after", "-universal was loaded"]),
        ("exported", ["model.safetensors: model.layers.0.mlp.up_proj.weight is BF16 [24, 16]"]),
    ],
)
def test_another_dtype_ends_the_run_with_the_name_of_the_tensor(results, what, words):
    assert all(word in results[what] for word in words), results[what]
