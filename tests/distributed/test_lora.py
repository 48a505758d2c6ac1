"""Adapters on real ranks, ZeRO stages 0 to 3: the cut does not matter, the base stays, and what is
saved is what plain libraries read."""

import json
from pathlib import Path

import pytest
import torch
from pairs import micro_batch, results_of
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sftmix.engine.state import only_tensors

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "lora_worker.py"
EXPORTED = [(0, "untied"), (1, "untied"), (2, "untied"), (3, "untied"), (0, "tied"), (3, "tied")]
NUM_ADAPTERS = 2 * 4 * (4 * (16 + 16) + 3 * (16 + 24))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    # With the default threshold weights as small as these stay whole on every rank, and nothing
    # would be gathered.
    sharded = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "zero3.json").write_text(json.dumps(sharded))
    return folder, results_of(WORKER, folder)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_cut_gives_the_losses_and_norms_of_one_process_without_zero(results, stage):
    _, found = results
    expected = found["0 untied head 1 x 4"]["steps"]
    assert expected[0][0] > expected[1][0] > expected[2][0]
    for layout in ("1 x 4", "2 x 2"):
        assert found[f"{stage} untied head {layout}"]["steps"] == [
            pytest.approx(step, rel=1e-5) for step in expected
        ]


@pytest.mark.parametrize("what", ["0 untied head", "3 tied head", "3 tied input_embeddings"])
def test_a_rank_without_a_response_token_changes_nothing(results, what):
    _, found = results
    expected = found[f"{what} 1 x 4"]["steps"]
    for layout in ("2 x 2", "one rank without a response token at times"):
        assert found[f"{what} {layout}"]["steps"] == [
            pytest.approx(step, rel=1e-5) for step in expected
        ]


def test_no_weight_stays_gathered_after_a_step(results):
    """Not with layers that are run again either, which others report."""
    _, found = results
    with_zero3 = {name: entry["gathered"] for name, entry in found.items() if name[0] == "3"}
    assert {name.split()[1] for name in with_zero3} == {"tied", "untied"}
    assert all(gathered == [] for gathered in with_zero3.values()), with_zero3


@pytest.mark.parametrize("layout", ["1 x 4", "2 x 2"])
@pytest.mark.parametrize("stage", [0, 3])
def test_mixing_at_the_input_depends_on_neither_cut_nor_stage(results, stage, layout):
    _, found = results
    expected = found["0 tied input_embeddings 1 x 4"]["steps"]
    assert found[f"{stage} tied input_embeddings {layout}"]["steps"] == [
        pytest.approx(step, rel=1e-5) for step in expected
    ]
    at_head = found["3 tied head 1 x 4"]["steps"][0]
    assert expected[0][0] == pytest.approx(at_head[0]) and expected[0][1] != pytest.approx(
        at_head[1], rel=1e-6
    )


def test_the_base_weights_are_bit_for_bit_what_they_were_and_only_adapters_are_trained(results):
    _, found = results
    for what, seen in found.items():
        assert seen["changed"] == [], what
        assert seen["num_trained"] == NUM_ADAPTERS < seen["num_parameters"], what
        assert [decay for decay, _ in seen["groups"]] == [0.1], what  # A and B are matrices
    for model in ("tied", "untied"):
        assert len({seen["frozen"] for what, seen in found.items() if f" {model} " in what}) == 1
    assert len({seen["frozen"] for seen in found.values()}) == 2


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("stage", "model"), EXPORTED)
def test_merged_model_and_adapter_give_the_engines_logits_in_plain_libraries(
    results, stage, model, num_ranks
):
    folder, _ = results
    export = folder / f"{stage}-{model}-{num_ranks}"
    expected = torch.load(export / "logits.pt", weights_only=True)
    batch = micro_batch([0, 2])
    base = AutoModelForCausalLM.from_pretrained(folder / model)
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        real = batch.attention_mask.bool()
        before = base(**inputs).logits
        models = {
            "merged": AutoModelForCausalLM.from_pretrained(export / "model"),
            "adapter": PeftModel.from_pretrained(base, export / "adapter"),
            "adapter alone": AutoPeftModelForCausalLM.from_pretrained(export / "adapter"),
        }
        for name, loaded in models.items():
            assert torch.allclose(
                loaded(**inputs).logits[real], expected[0], rtol=1e-5, atol=1e-6
            ), name
    assert (before[real] - expected[0]).abs().max() > 1e-2
    is_tied = (
        models["merged"].get_output_embeddings().weight
        is models["merged"].get_input_embeddings().weight
    )
    assert is_tied == (model == "tied")
    settings = json.loads((export / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / model) and (
        settings["r"],
        settings["lora_alpha"],
    ) == (4, 8)
    assert (
        sum(
            tensor.numel()
            for tensor in load_file(export / "adapter" / "adapter_model.safetensors").values()
        )
        == NUM_ADAPTERS
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(("stage", "model"), EXPORTED)
def test_the_training_state_holds_adapters_alone(results, stage, model, num_ranks):
    folder, _ = results
    files = sorted((folder / f"{stage}-{model}-{num_ranks}" / "state").glob("*.pt"))
    with only_tensors():
        states = [torch.load(path, weights_only=True) for path in files]
    held = {
        name
        for state in states
        for name, tensor in (state.get("module") or {}).items()
        if tensor.numel()
    }
    assert held == set() if stage == 3 else (held and all(".lora_" in name for name in held))
    assert not any(state.get("frozen_param_fragments") for state in states)
