"""No rank holds a whole model while it is loaded or exported under ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch
from pairs import results_of_each
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.distributed
WORKER = Path(__file__).parent / "memory_worker.py"
SLACK = 40 << 20  # bytes for what is not weights


def bytes_of(model):
    return {name: 4 * tensor.numel() for name, tensor in model.named_parameters()}


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.for_model(
        "llama",
        vocab_size=99,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    model.save_pretrained(folder / "model")
    config = AutoConfig.for_model(**{**model.config.to_dict(), "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "small")
    # Else ZeRO-3 keeps what a forward has gathered, up to a thousand million weights.
    live = {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    (folder / "little_live.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, **live}})
    )
    return folder, results_of_each(WORKER, folder, (2,))[2]


def test_a_rank_holds_its_shard_and_three_tensors(results, model):
    _, ranks = results
    sizes = bytes_of(model)
    whole, largest = sum(sizes.values()), max(sizes.values())
    assert whole / 2 > 3 * largest + SLACK  # else the test would show nothing
    for rank in ranks:
        assert rank["loading"] < whole / 2 + 3 * largest + SLACK
        assert rank["exporting"] < 3 * largest + SLACK


def test_what_was_loaded_is_exported(results, model):
    folder, _ = results
    again = AutoModelForCausalLM.from_pretrained(folder / "export-2")
    for name, tensor in again.named_parameters():
        assert torch.equal(tensor, model.get_parameter(name)), name
