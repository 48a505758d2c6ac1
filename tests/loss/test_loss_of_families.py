"""The loss on real architectures against a naive one on the unmodified Hugging Face model: two
forwards, mixed hidden states, one-hot labels, autograd, float64."""

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES
from naive import (
    PARTNERS,
    hidden_before_head,
    make_examples,
    make_model,
    naive_loss,
    naive_mixup_of_inputs,
    ours_of,
)

from sftmix.batches.collate import build_micro_batch
from sftmix.batches.cut import StepCounts
from sftmix.errors import ConfigError
from sftmix.loss import head
from sftmix.loss.head import CausalLMWithLoss
from sftmix.loss.logit_transform import LogitTransform, find_logit_transform
from sftmix.loss.objective import Objective, loss_request
from sftmix.loss.requests import LossRequest, MixedRequest, ScoreRequest

# their norms compute in float32 whatever they are given
IN_FLOAT32 = {"gemma2", "cohere-scaled-logits"}
MU = 0.3


@pytest.mark.parametrize("backend", ["torch", "triton", "reference", None])
@pytest.mark.parametrize("kind", ["score", "loss", "mixed"])
def test_the_kernels_get_the_backend_that_was_asked_for(kind, backend, monkeypatch):
    """On a GPU another one would run, without a word, where a name is replaced on the way."""
    asked = []

    def note(*arguments, **options):
        asked.append(options["backend"] if "backend" in options else arguments[-1])
        raise Noted

    class Noted(Exception):
        pass

    for name in (
        "linear_token_scores",
        "fused_linear_mixup_cross_entropy",
        "mixup_cross_entropy",
    ):
        monkeypatch.setattr(head, name, note)
    rows, labels = torch.arange(2), torch.tensor([1, 2])
    requests = {
        "score": ScoreRequest(rows, labels, backend),
        "loss": LossRequest(rows, labels, torch.zeros(0, 2), torch.zeros(0), 2, 0, MU, backend),
        "mixed": MixedRequest(rows, torch.tensor([[1, 2], [2, 1]]), torch.ones(2), 2, backend),
    }
    projection = head.HeadProjection(torch.nn.Linear(4, 8))
    with pytest.raises(Noted):
        projection(torch.zeros(1, 2, 4), requests[kind])
    assert asked == [backend]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sftmix_loss_and_gradients_equal_the_naive_ones(name, backend):
    model, transform = make_model(name)
    ours = ours_of(copy.deepcopy(model))
    examples = make_examples()
    ntp, mixup, counts = naive_loss(model, examples, transform)
    (ntp + MU * mixup).backward()

    batch = build_micro_batch(examples, PARTNERS, indices=tuple(range(len(examples))), pad_id=0)
    assert batch.pairs.shape[0] == counts.num_mixup_tokens
    request = loss_request(Objective(MU), batch, counts, backend=backend)
    loss, our_ntp, our_mixup, _, _ = ours(batch.input_ids, batch.attention_mask, request)
    if "moe" in name:
        # The router loss is a function of the whole padded batch: compared in its own test; its
        # gradient is taken out here.
        ours.auxiliary_weight = 0.0
        loss = ours(batch.input_ids, batch.attention_mask, request)[0]
    loss.backward()

    loss_tolerance = 1e-6 if name in IN_FLOAT32 else 1e-9
    assert our_ntp.item() == pytest.approx(ntp.item(), rel=loss_tolerance)
    assert our_mixup.item() == pytest.approx(mixup.item(), rel=loss_tolerance)
    expected = {n: p.grad for n, p in model.named_parameters()}
    got = {ours.plain_name(n): p.grad for n, p in ours.named_parameters()}
    assert set(got) == set(expected)
    for parameter, grad in expected.items():
        if grad is None:  # an expert that no token chose
            assert got[parameter] is None or not got[parameter].any()
            continue
        scale = grad.abs().max().item() or 1.0
        tolerance = 1e-5 if name in IN_FLOAT32 else 1e-8
        assert torch.allclose(got[parameter], grad, rtol=tolerance, atol=tolerance / 10 * scale), (
            parameter
        )


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2", "phi-head-with-bias"])
def test_mixing_at_the_input_equals_sequences_written_out(name):
    model, transform = make_model(name)
    ours = ours_of(copy.deepcopy(model))
    examples = make_examples()
    ntp, _, counts = naive_loss(model, examples, transform)
    mixup = naive_mixup_of_inputs(model, examples)
    (ntp + MU * mixup).backward()

    batch = build_micro_batch(
        examples, PARTNERS, indices=tuple(range(len(examples))), pad_id=0, mixes_inputs=True
    )
    request = loss_request(Objective(MU, "input_embeddings"), batch, counts)
    loss, our_ntp, our_mixup, _, _ = ours(batch.input_ids, batch.attention_mask, request)
    loss.backward()
    tolerance = 1e-5 if name in IN_FLOAT32 else 1e-9
    assert our_ntp.item() == pytest.approx(ntp.item(), rel=tolerance)
    assert our_mixup.item() == pytest.approx(mixup.item(), rel=tolerance)
    got = {ours.plain_name(n): p.grad for n, p in ours.named_parameters()}
    for parameter, tensor in model.named_parameters():
        scale = tensor.grad.abs().max().item() or 1.0
        assert torch.allclose(
            got[parameter], tensor.grad, rtol=10 * tolerance, atol=tolerance * scale
        ), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_ntp_loss_equals_that_of_transformers(name):
    model, _ = make_model(name)
    ours = ours_of(copy.deepcopy(model))
    examples = make_examples()
    batch = build_micro_batch(examples, [], indices=tuple(range(len(examples))), pad_id=0)
    labels = torch.full_like(batch.input_ids, -100)
    for row, (ids, mask) in enumerate(examples):
        labels[row, : len(ids)] = torch.where(
            torch.from_numpy(mask), torch.from_numpy(ids.astype(np.int64)), -100
        )
    options = {"output_router_logits": True} if "moe" in name else {}
    theirs = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, **options
    )
    request = loss_request(Objective(), batch, StepCounts(batch.labels.numel(), 0))
    loss, _, _, _, auxiliary = ours(batch.input_ids, batch.attention_mask, request)
    # transformers computes its loss in float32
    assert loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert (auxiliary.item() > 0) == ("moe" in name)
    theirs.loss.backward()
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    got = {ours.plain_name(n): p.grad for n, p in ours.named_parameters()}
    for parameter, grad in expected.items():
        assert torch.allclose(
            got[parameter], grad, rtol=1e-4, atol=1e-6 * (grad.abs().max().item() or 1.0)
        ), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_model_does_to_its_logits_is_found(name):
    model, transform = make_model(name)
    found = ours_of(model).projection.transform
    assert found.scale == (
        pytest.approx(transform["scale"], rel=1e-5) if "scale" in transform else None
    )
    assert found.softcap == (
        pytest.approx(transform["softcap"], rel=1e-6) if "softcap" in transform else None
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere-scaled-logits", "phi-head-with-bias"])
def test_scores_equal_the_unmodified_models_losses_one_example_at_a_time(name):
    model, _ = make_model(name)
    examples = make_examples()
    expected, likeliest = [], []
    for ids, mask in examples:
        _, logits = hidden_before_head(model, ids)
        at = np.flatnonzero(mask)
        label = torch.from_numpy(ids[at].astype(np.int64))
        expected.append(
            torch.nn.functional.cross_entropy(logits[at - 1], label, reduction="none").detach()
        )
        likeliest.append(-torch.log_softmax(logits[at - 1], dim=1).amax(dim=1).detach())
    ours = ours_of(model)
    batch = build_micro_batch(examples, [], indices=tuple(range(len(examples))), pad_id=0)
    scores = ours(batch.input_ids, batch.attention_mask, ScoreRequest(batch.rows, batch.labels))
    assert torch.allclose(scores.nll.double(), torch.cat(expected), rtol=1e-5)
    assert torch.allclose(scores.top_nll.double(), torch.cat(likeliest), rtol=1e-5)


def test_without_a_request_the_head_gives_the_models_logits():
    model, _ = make_model("gemma2")
    ids = torch.arange(3, 15)[None]
    expected = model(input_ids=ids).logits
    assert torch.equal(ours_of(model)(ids, torch.ones_like(ids), None), expected)


def test_tied_weights_stay_one_parameter():
    model, _ = make_model("llama-tied")
    ours = CausalLMWithLoss(model)
    assert ours.projection.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in {ours.plain_name(n) for n, _ in ours.named_parameters()}


def test_a_model_that_squares_its_logits_is_refused():
    model, _ = make_model("llama")
    ours = CausalLMWithLoss(model)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits**2
        return output

    model.forward = forward
    with pytest.raises(ConfigError, match="neither a scale nor a soft-cap"):
        find_logit_transform(ours, torch.device("cpu"))


def test_the_wrong_order_of_mix_and_soft_cap_would_be_noticed():  # the test of the test
    model, transform = make_model("gemma2")
    examples = make_examples()
    _, mixup, counts = naive_loss(model, examples, transform)
    ours = CausalLMWithLoss(model)
    ours.projection.transform = LogitTransform()
    batch = build_micro_batch(examples, PARTNERS, indices=(0, 1, 2, 3, 4), pad_id=0)
    wrong = ours(batch.input_ids, batch.attention_mask, loss_request(Objective(MU), batch, counts))[
        2
    ]
    assert abs(wrong.item() - mixup.item()) > 1e-4
