"""Objectives of next tokens in a whole model: packed, padded, and with noise on its embeddings."""

import copy

import pytest
import torch
from naive import PARTNERS, make_examples, make_model, naive_loss, ours_of

from sftmix.batches.collate import build_micro_batch
from sftmix.config.schema import ObjectiveConfig
from sftmix.loss.head import noisy_embeddings
from sftmix.loss.objective import Objective, loss_request
from sftmix.loss.packed_attention import use_packed_attention
from sftmix.loss.requests import ScoreRequest

MU = 0.3


def result_of(ours, objective, counts, *, packs, seed=0):
    examples = make_examples()
    batch = build_micro_batch(
        examples, PARTNERS, indices=tuple(range(len(examples))), pad_id=0, packs=packs
    )
    torch.manual_seed(seed)
    return ours(
        batch.input_ids,
        batch.attention_mask,
        loss_request(objective, batch, counts),
        batch.documents,
    )


@pytest.fixture(scope="module")
def llama():
    model, transform = make_model("llama")
    counts = naive_loss(model, make_examples(), transform)[2]
    packed = copy.deepcopy(model)
    assert use_packed_attention(packed) is not None
    return {False: ours_of(copy.deepcopy(model)), True: ours_of(packed, packs=True)}, counts


@pytest.mark.parametrize("packs", [False, True])
def test_dft_in_a_model_equals_its_definition_on_the_token_losses(llama, packs):
    """DFT: sg(p) (-log p), so its gradient is that of -p, where p comes from our own scores."""
    models, counts = llama
    ours = models[packs]
    ours.zero_grad()
    dft = Objective(MU, next_token=ObjectiveConfig(weighting="dft"))
    result = result_of(ours, dft, counts, packs=packs)
    p = torch.exp(-result.token_nll.double())
    expected = (p * result.token_nll).sum() / counts.num_ntp_tokens + MU * result.mixup
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    result.loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}

    # -p / N has the same gradient; p from the reference version, by autograd
    plain = models[False]
    plain.zero_grad()
    examples = make_examples()
    batch = build_micro_batch(
        examples, PARTNERS, indices=tuple(range(len(examples))), pad_id=0, packs=False
    )
    logits = plain(batch.input_ids, batch.attention_mask, None).flatten(0, 1)[batch.rows]
    at_label = torch.softmax(logits, 1).gather(1, batch.labels[:, None])
    (-at_label.sum() / counts.num_ntp_tokens).backward()
    only_mixup = Objective(MU, next_token=ObjectiveConfig(ntp_weight=0))
    result_of(plain, only_mixup, counts, packs=False).loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(got[name], parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("packs", [False, True])
def test_neftune_repeats_with_the_seed_and_never_touches_scores(llama, packs):
    models, counts = llama
    ours = models[packs]
    noisy = Objective(MU, next_token=ObjectiveConfig(neftune_alpha=10))
    plain = result_of(ours, Objective(MU), counts, packs=packs)
    first, again, other = (
        result_of(ours, noisy, counts, packs=packs, seed=seed) for seed in (1, 1, 2)
    )
    assert first.loss == again.loss != other.loss
    assert first.loss != plain.loss and result_of(
        ours, Objective(MU), counts, packs=packs
    ).loss == (plain.loss)
    batch = build_micro_batch(make_examples(), PARTNERS, indices=tuple(range(4)), pad_id=0)
    if not packs:
        score = ours(batch.input_ids, batch.attention_mask, ScoreRequest(batch.rows, batch.labels))
        assert torch.allclose(score.nll, plain.token_nll)


def test_the_noise_of_a_token_has_the_size_of_its_own_example():
    embedding = torch.nn.Embedding(10, 64)
    lengths = torch.tensor([[4] * 4 + [25] * 25])
    ids = torch.randint(10, (1, 29))
    clean = embedding(ids)
    with noisy_embeddings(embedding, 5.0, lengths):
        noise = (embedding(ids) - clean).detach()[0]
    assert torch.equal(embedding(ids), clean)
    for part, length in ((noise[:4], 4), (noise[4:], 25)):
        limit = 5.0 / (length * 64) ** 0.5
        assert limit * 0.9 < part.abs().max() <= limit * (1 + 1e-5)
        assert abs(float(part.mean())) < 0.2 * limit  # both signs
