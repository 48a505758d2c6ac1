"""LoRA against plain peft on the unmodified model and autograd, in float64; what is merged; what is
refused."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from naive import PARTNERS, make_examples, make_model, naive_loss, naive_mixup_of_inputs, ours_of
from pairs import COUNTS, micro_batch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers_for_tests import character_tokenizer
from transformers import AutoModelForCausalLM

from sftmix.batches.collate import build_micro_batch
from sftmix.config.schema import Config, ModelConfig
from sftmix.data.template import ALPACA
from sftmix.engine.loading import empty_model, hf_config
from sftmix.engine.lora import (
    adapted_layers,
    adapter_weights,
    add_adapters,
    checksum,
    is_adapter,
    merged_weight,
    num_adapter_parameters,
    target_names,
    write_adapter,
)
from sftmix.errors import ConfigError
from sftmix.loss.objective import Objective, loss_request
from sftmix.pipeline.order import model_identity
from sftmix.pipeline.preflight import check
from sftmix.pipeline.stages.inputs import trained_model
from sftmix.planning.states import Need

# Plain peft asks for the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

MU, RANK, ALPHA = 0.3, 3, 5.0
FAMILIES = ["llama", "llama-tied", "qwen2", "gpt2", "gpt-neox", "phi-head-with-bias", "mixtral-moe"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"


def lora_model(targets="all-linear", **settings):
    return ModelConfig(
        architecture=LLAMA,
        lora={"rank": RANK, "alpha": ALPHA, "target_modules": targets, **settings},
    )


def with_adapters(model, targets="all-linear"):
    """Returns a copy with our adapters; B is not zero, so that every gradient is of interest."""
    ours = copy.deepcopy(model)
    add_adapters(ours, lora_model(targets), dtype=torch.float64, seed=0, name="model")
    generator = torch.Generator().manual_seed(1)
    for _, layer in adapted_layers(ours):
        b = adapter_weights(layer)["lora_B.weight"]
        b.data = torch.randn(b.shape, generator=generator, dtype=b.dtype)
    return ours


def peft_model(model):
    """Returns a copy with peft's adapters, as peft makes them."""
    # Of a mixture of experts peft takes fused experts for linear modules, as they were in
    # transformers 4.
    targets = ATTENTION if model.config.model_type == "mixtral" else "all-linear"
    return get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"),
    )


def plain_peft(model, ours):
    """Returns a copy with peft's adapters and the weights of ours."""
    plain = peft_model(model)
    given = {
        f"base_model.model.{name}": p for name, p in ours.named_parameters() if is_adapter(name)
    }
    found = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert set(found) == set(given)
    for name, parameter in found.items():
        parameter.data = given[name].data.clone()
    return plain.eval()


@pytest.mark.parametrize("site", ["head", "input_embeddings"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_adapter_gradients_equal_plain_peft_and_autograd(name, site):
    model, transform = make_model(name)
    ours = with_adapters(model)
    plain = plain_peft(model, ours)
    examples = make_examples()
    ntp, mixup, counts = naive_loss(plain, examples, transform)
    if site == "input_embeddings":
        mixup = naive_mixup_of_inputs(plain, examples)
    (ntp + MU * mixup).backward()

    wrapped = ours_of(ours)
    batch = build_micro_batch(
        examples,
        PARTNERS,
        indices=tuple(range(len(examples))),
        pad_id=0,
        mixes_inputs=site == "input_embeddings",
    )
    wrapped.auxiliary_weight = 0.0  # the router loss is a function of the whole padded batch
    loss, our_ntp, our_mixup, _, _ = wrapped(
        batch.input_ids, batch.attention_mask, loss_request(Objective(MU, site), batch, counts)
    )
    loss.backward()
    assert our_ntp.item() == pytest.approx(
        ntp.item(), rel=1e-9
    ) and our_mixup.item() == pytest.approx(mixup.item(), rel=1e-9)
    expected = {
        n.removeprefix("base_model.model."): p.grad
        for n, p in plain.named_parameters()
        if p.requires_grad
    }
    compared = 0
    for parameter_name, parameter in ours.named_parameters():
        if not is_adapter(parameter_name):
            assert parameter.grad is None and not parameter.requires_grad, parameter_name
            continue
        grad = expected[parameter_name]
        scale = grad.abs().max().item()
        assert scale > 0 and torch.allclose(parameter.grad, grad, rtol=1e-8, atol=1e-9 * scale), (
            parameter_name
        )
        compared += 1
    assert compared == len(expected) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_loss_is_the_base_models_to_the_last_bit(dtype):
    config = lora_model(dropout=0.5)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(hf_config(config), dtype=dtype)
    ours = copy.deepcopy(base)
    add_adapters(ours, config, dtype=dtype, seed=0, name="model")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    batch = micro_batch([0, 1, 2, 3])
    request = loss_request(Objective(MU), batch, COUNTS)
    losses = [
        ours_of(model)(batch.input_ids, batch.attention_mask, request) for model in (base, ours)
    ]
    assert torch.equal(losses[0][0], losses[1][0]) and torch.equal(losses[0][3], losses[1][3])
    before = {name: p.clone() for name, p in ours.named_parameters() if is_adapter(name)}
    assert all((p == 0).all() == (".lora_B." in name) for name, p in before.items())


def test_adapters_begin_the_same_whatever_the_precision_and_the_state_of_the_generator():
    started = []
    for number, (dtype, seed) in enumerate(
        ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1))
    ):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(hf_config(lora_model()), dtype=dtype)
        state = torch.get_rng_state()
        add_adapters(model, lora_model(), dtype=dtype, seed=seed, name="model")
        assert torch.equal(state, torch.get_rng_state())
        started.append({name: p for name, p in model.named_parameters() if is_adapter(name)})
    assert all(torch.equal(p.bfloat16(), started[1][name]) for name, p in started[0].items())
    assert any(not torch.equal(p, started[2][name]) for name, p in started[0].items())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "phi-head-with-bias"])
def test_merged_weights_give_the_logits_of_the_adapters(name):
    model, _ = make_model(name)
    ours = with_adapters(model)
    ids = torch.arange(3, 19)[None]
    logits, base = ours(ids).logits, model(ids).logits
    assert (logits - base).abs().max() > 0.1
    with torch.no_grad():
        for module_name, layer in adapted_layers(ours):
            model.get_submodule(module_name).weight.copy_(merged_weight(layer))
    assert torch.allclose(model(ids).logits, logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_reads_the_adapter_that_is_written(name, tmp_path):
    model, _ = make_model(name)
    ours = with_adapters(model)
    state = {
        f"{key}.{part}": p.data
        for key, layer in adapted_layers(ours)
        for part, p in adapter_weights(layer).items()
    }
    write_adapter(tmp_path, ours, state)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, autocast_adapter_dtype=False)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (
        RANK,
        ALPHA,
        "LORA",
    ) and settings["inference_mode"]


# What a config may say.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"path": "m", "lora": {"rank": 0}}}, "greater than or equal to 1"),
        ({"model": {"path": "m", "lora": {"dropout": 1}}}, "less than 1"),
        (
            {"model": {"path": "m", "lora": {"target_modules": "q_proj"}}},
            "expected `all-linear` or a list of names of modules",
        ),
        (
            {"model": {"path": "m", "lora": {"target_modules": []}}},
            "expected `all-linear` or a list of names of modules",
        ),
        (
            {"confidence": {"models": [{"path": "m", "lora": {}}]}},
            "`lora` belongs to a model that is trained",
        ),
    ],
)
def test_what_makes_no_sense_of_adapters_is_refused(change, message):
    settings = {"run": {"dir": "x"}, "model": {"path": "m"}, "data": {"path": "d"}}
    assert (
        Config.model_validate({**settings, "model": {"path": "m", "lora": {}}}).reference_model.lora
        is not None
    )
    with pytest.raises(ValueError, match=message):
        Config.model_validate({**settings, **change})


def test_a_model_without_adapters_is_told_from_others_as_it_always_was():
    # else every finished stage would be run again
    assert "lora" not in model_identity(ModelConfig(path="m"))
    assert model_identity(ModelConfig(path="m", lora={}))["lora"]["rank"] == 16
    assert trained_model(ModelConfig(path="m", lora={}), Path("x")) == ModelConfig(path="x")


# Where adapters go.


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_is_what_it_is_to_peft_and_counted_without_memory(name):
    model, _ = make_model(name)
    ours = with_adapters(model)
    plain = peft_model(model)
    assert [key for key, _ in adapted_layers(ours)] == [
        key.removeprefix("base_model.model.") for key, _ in adapted_layers(plain)
    ]
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert num_adapter_parameters(empty, lora_model().lora, name="model") == trained


def test_modules_are_chosen_by_the_end_of_their_name():
    model = empty_model(lora_model(), hf_config(lora_model()))
    chosen = target_names(model, lora_model(["q_proj", "layers.1.mlp.up_proj"]).lora, name="model")
    assert chosen == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "q_porj",
            (
                f"no module of a LlamaForCausalLM is called `q_porj`; its linear ones: {LINEAR}."
                " Did you mean `q_proj`?"
            ),
        ),
        ("proj", f"no module of a LlamaForCausalLM is called `proj`; its linear ones: {LINEAR}."),
        ("lm_head", "`lm_head` is the head, which stays frozen"),
        ("embed_tokens", "`embed_tokens` is the embedding, which stays frozen"),
        (
            "mlp",
            (
                "`mlp` names model.layers.0.mlp, a LlamaMLP, and an adapter goes beside a linear"
                " module"
            ),
        ),
        ("norm", "`norm` names model.norm, a LlamaRMSNorm, and"),
    ],
)
def test_a_target_that_cannot_have_an_adapter_is_refused_before_a_run(target, message, tmp_path):
    character_tokenizer(chat_template=ALPACA).save_pretrained(tmp_path)
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"architecture": LLAMA, "lora": {"target_modules": ["q_proj", target]}},
        "tokenizer": {"path": str(tmp_path)},
        "data": {"generator": {}, "max_length": 64},
    }
    with pytest.raises(ConfigError) as caught:
        check(Config.model_validate(settings))
    assert str(caught.value).startswith("model.lora.target_modules: ") and message in str(
        caught.value
    )
    settings["reference"] = {"model": settings.pop("model")}
    with pytest.raises(ConfigError, match=r"^reference\.model\.lora\.target_modules: "):
        check(Config.model_validate({**settings, "model": {"architecture": LLAMA}}))


def test_without_peft_a_run_is_refused_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    character_tokenizer(chat_template=ALPACA).save_pretrained(tmp_path)
    model = {"architecture": LLAMA, "lora": {}}
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": model,
        "tokenizer": {"path": str(tmp_path)},
    }
    with pytest.raises(
        ConfigError,
        match=r"needs the packages peft and accelerate.*pip install '\.\[lora\]'",
    ):
        check(Config.model_validate({**settings, "data": {"generator": {}, "max_length": 64}}))
    check(
        Config.model_validate(
            {
                **settings,
                "model": {"architecture": LLAMA},
                "data": {"generator": {}, "max_length": 64},
            }
        )
    )


# What a run needs.


def test_only_adapters_have_states_in_the_estimate_of_memory():
    settings = {
        "run": {"dir": "x"},
        "model": {"architecture": LLAMA},
        "tokenizer": {"train": {}},
        "data": {"generator": {}},
    }
    full = Need(
        Config.model_validate({**settings, "engine": {"precision": "bf16", "zero_stage": 1}}), 1, 1
    )
    settings["model"] = {**settings["model"], "lora": {"rank": RANK}}
    lora = Need(
        Config.model_validate({**settings, "engine": {"precision": "bf16", "zero_stage": 1}}), 1, 1
    )
    whole, adapters = lora.num_parameters, lora.num_adapter_parameters
    assert whole == full.num_parameters and full.num_adapter_parameters == 0
    assert adapters == 2 * RANK * (4 * (32 + 32) + 3 * (32 + 48))
    assert (
        full.gpu_bytes == (2 + 4 + 12) * whole
        and lora.gpu_bytes == 2 * (whole + adapters) + (4 + 12) * adapters
    )
    assert full.disk_bytes - lora.disk_bytes == (2 + 12) * 3 * (whole - adapters)
    assert (
        lora.step_traffic == {"gather": 2 * adapters, "reduce": 2 * adapters}
        and f"{adapters:,} more of adapters" in lora.described
    )


def test_a_checksum_sees_every_bit_and_place():
    tensor = torch.arange(1.0, 33.0, dtype=torch.bfloat16)
    changed, swapped = tensor.clone(), tensor[[1, 0, *range(2, 32)]]
    changed.view(torch.int16)[17] ^= 1
    assert (
        len({checksum(t) for t in (tensor, changed, swapped, tensor.reshape(4, 8), tensor.float())})
        == 4
    )
