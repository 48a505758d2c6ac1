"""Packed equals alone: loss and gradients of packed examples against the naive ones of each example
by itself on the unmodified model; and models for which that does not hold are found."""

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, GROUPED, SIZES
from naive import (
    PARTNERS,
    make_examples,
    make_model,
    model_from,
    naive_loss,
    naive_mixup_of_inputs,
    ours_of,
)

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.documents import Documents
from sftmix.engine.engine import enable_activation_checkpointing
from sftmix.loss import packed_attention
from sftmix.loss.head import CausalLMWithLoss
from sftmix.loss.objective import Objective, loss_request
from sftmix.loss.packed_attention import (
    NAME,
    CannotPack,
    attending_within,
    use_packed_attention,
    why_not_packed,
)

MU = 0.3
WINDOW = {"sliding_window": 4}
PACKED = {
    **{name: settings for name, (settings, _) in FAMILIES.items()},
    "mistral with a window": {"model_type": "mistral", **WINDOW, **GROUPED},
    "qwen2 with a window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": 1,
        **WINDOW,
        **GROUPED,
    },
    "gemma": {"model_type": "gemma", "head_dim": 8, **GROUPED},
    "gemma2 with a window and a soft-cap": {
        "model_type": "gemma2",
        "head_dim": 8,
        "attn_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": None,
        **WINDOW,
        **GROUPED,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        **WINDOW,
        **GROUPED,
    },
    "olmo2": {"model_type": "olmo2", **GROUPED},
    "stablelm": {"model_type": "stablelm", **GROUPED},
    "exaone4": {"model_type": "exaone4", **WINDOW, **GROUPED},
    "opt": {
        "model_type": "opt",
        "vocab_size": 97,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
    },
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 97,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
LEAKS = "a document changes the one after it"
PADDED = {
    "mamba2": (
        {
            "model_type": "mamba2",
            "vocab_size": 97,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "num_heads": 8,
            "state_size": 8,
            "n_groups": 1,
            "expand": 2,
        },
        LEAKS,
    ),
    "bamba": (
        {
            "model_type": "bamba",
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "attn_layer_indices": [1],
            **GROUPED,
        },
        LEAKS,
    ),
    "lfm2": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], **GROUPED},
        LEAKS,
    ),
    "gpt_oss": (
        {
            "model_type": "gpt_oss",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            **GROUPED,
        },
        "its attention has `s_aux`",
    ),
    "llama4": (
        {
            "model_type": "llama4_text",
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 4,
            **GROUPED,
        },
        "its mask is not causal with a window",
    ),
}
NOT_REPLACEABLE = {
    "bloom": {
        "model_type": "bloom",
        "vocab_size": 97,
        "hidden_size": 32,
        "n_layer": 2,
        "n_head": 4,
    },
    "falcon": {"model_type": "falcon", **SIZES},
}


def packed_model(model):
    if use_packed_attention(model) is None:
        assert model.config.model_type == "gptj"
        pytest.skip("this release of transformers cannot replace its attention")
    return ours_of(model, packs=True)


def loss_of(ours, *, site="head", mixup_weight=MU, counts, examples):
    batch = build_micro_batch(
        examples,
        PARTNERS,
        indices=tuple(range(len(examples))),
        pad_id=0,
        mixes_inputs=site == "input_embeddings",
        packs=True,
    )
    request = loss_request(Objective(mixup_weight, site), batch, counts)
    return ours(batch.input_ids, batch.attention_mask, request, batch.documents)


def assert_same_gradients(ours, model, tolerance):
    got = {ours.plain_name(n): p.grad for n, p in ours.named_parameters()}
    largest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:  # an expert that no token chose
            assert got[name] is None or not got[name].any()
            continue
        # that of a key's bias is rounding: a softmax does not see it
        scale = max(parameter.grad.abs().max().item(), 1e-3 * largest)
        assert torch.allclose(got[name], parameter.grad, rtol=tolerance, atol=tolerance * scale), (
            name
        )


@pytest.mark.parametrize("name", PACKED)
def test_packed_loss_and_gradients_equal_those_of_each_example_alone(name):
    if name in FAMILIES:
        model, transform = make_model(name)
    else:
        model, transform = model_from(PACKED[name]), {}
    ours = packed_model(copy.deepcopy(model))
    ours.auxiliary_weight = 0.0  # a router loss is one of the whole micro-batch
    examples = make_examples()
    ntp, mixup, counts = naive_loss(model, examples, transform)
    (ntp + MU * mixup).backward()
    result = loss_of(ours, counts=counts, examples=examples)
    result.loss.backward()
    assert result.ntp.item() == pytest.approx(ntp.item(), rel=1e-5)
    assert result.mixup.item() == pytest.approx(mixup.item(), rel=1e-5)
    assert_same_gradients(ours, model, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_mixed_input_sequences_are_packed_too(name):
    model, transform = make_model(name)
    ours = packed_model(copy.deepcopy(model))
    examples = make_examples()
    ntp, _, counts = naive_loss(model, examples, transform)
    mixup = naive_mixup_of_inputs(model, examples)
    (ntp + MU * mixup).backward()
    result = loss_of(ours, site="input_embeddings", counts=counts, examples=examples)
    result.loss.backward()
    assert result.mixup.item() == pytest.approx(mixup.item(), rel=1e-5)
    assert_same_gradients(ours, model, 1e-5)


@pytest.mark.parametrize("site", ["head", "input_embeddings"])
def test_layers_that_run_again_in_the_backward_see_the_same_documents(site):
    model, _ = make_model("llama")
    examples = make_examples()
    counts = naive_loss(model, examples, {})[2]
    gradients = []
    for checkpoints in (False, True):
        ours = packed_model(copy.deepcopy(model))
        if checkpoints:
            enable_activation_checkpointing(ours.model)
            ours.train()
        loss_of(ours, site=site, counts=counts, examples=examples).loss.backward()
        # another forward, of other documents, in between would change a mask that is not kept
        gradients.append([p.grad for p in ours.parameters()])
    for without, again in zip(*gradients, strict=True):
        assert torch.allclose(without, again, rtol=1e-9, atol=1e-12)


def checks(model):
    """Returns what `why_not_packed` says of a model in its own attention's name."""
    own = use_packed_attention(model)

    def packed(ids, documents):
        model.set_attn_implementation(NAME)
        with attending_within(documents):
            return model(input_ids=ids, position_ids=documents.position_ids, use_cache=False).logits

    def alone(ids):
        model.set_attn_implementation(own)
        return model(input_ids=ids, use_cache=False).logits

    return why_not_packed(packed, alone, 97, torch.device("cpu"))


@pytest.mark.parametrize("name", PACKED)
def test_the_check_passes_models_that_are_packed(name):
    assert checks(model_from(PACKED[name])) is None


@pytest.mark.parametrize("name", PADDED)
def test_models_that_would_not_compute_the_same_are_padded(name):
    settings, reason = PADDED[name]
    found = checks(model_from(settings, dtype=torch.float32))
    assert found is not None and found.startswith(reason), found


@pytest.mark.parametrize("name", NOT_REPLACEABLE)
def test_models_whose_attention_cannot_be_replaced_are_left_as_they_are(name):
    model = model_from(NOT_REPLACEABLE[name])
    before = model.config._attn_implementation
    assert use_packed_attention(model) is None and model.config._attn_implementation == before


def test_attention_over_the_whole_row_is_found(monkeypatch):
    """The check can fail: one document that reads another, and positions that go on."""
    whole = packed_attention.document_attention

    def leaking(query, key, value, lengths, bounds, **options):
        total = sum(lengths)
        return whole(query, key, value, (total,), torch.tensor([0, total]), **options)

    monkeypatch.setattr(packed_attention, "document_attention", leaking)
    assert checks(model_from(PACKED["llama"])).startswith(LEAKS)


def test_positions_that_go_on_over_documents_are_found(monkeypatch):
    one = Documents.of((12,))
    monkeypatch.setattr(
        Documents,
        "of",
        classmethod(lambda cls, lengths: cls(lengths, torch.tensor([0, 7, 12]), one.position_ids)),
    )
    assert checks(model_from(PACKED["gpt2"])).startswith("logits differ")


def test_a_mask_in_chunks_is_refused_after_the_check_too():
    """Documents of the check may be shorter than a chunk."""
    settings, _ = PADDED["llama4"]
    model = model_from(settings, dtype=torch.float32)
    use_packed_attention(model)
    documents = Documents.of((11,))
    with attending_within(documents), pytest.raises(CannotPack, match="not causal with a window"):
        model(input_ids=torch.ones(1, 11, dtype=torch.int64), use_cache=False)


def test_a_wrapped_model_without_documents_is_not_packed_silently():
    model = model_from(PACKED["llama"])
    use_packed_attention(model)
    ids = torch.from_numpy(np.arange(6))[None]
    with pytest.raises(AssertionError, match="attending_within"):
        CausalLMWithLoss(model)(ids, torch.ones_like(ids), None)
