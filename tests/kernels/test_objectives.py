"""Objectives for next tokens on the fused head, each against its definition in float64."""

import math

import pytest
import torch

from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy
from sftmix.kernels.token_weights import GROUP_COLUMNS, entropy_weights, largest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton", "reference"]
TRANSFORMS = {"none": {}, "scale and cap": {"logit_scale": 0.7, "logit_softcap": 4.0}}
ROWS, WIDTH, VOCABULARY, PAIRS = 11, 6, 37, 4


@pytest.fixture
def inputs(monkeypatch):
    import sftmix.kernels.chunked_linear_mixup as chunked

    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", 1)  # several chunks
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 4)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)

    labels = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    labels[3] = -100
    return {
        "hidden": normal(ROWS, WIDTH).requires_grad_(),
        "weight": normal(VOCABULARY, WIDTH).requires_grad_(),
        "labels": labels.to(DEVICE),
        "pairs": torch.randperm(ROWS, generator=generator)[: 2 * PAIRS].view(-1, 2).to(DEVICE),
        "lam": torch.rand(PAIRS, generator=generator, dtype=torch.float64).to(DEVICE),
    }


def shown(inputs, logit_scale=1.0, logit_softcap=None):
    logits = logit_scale * inputs["hidden"] @ inputs["weight"].T
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


def nll_of(logits, labels, **options):
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none", **options)


def entropy_of_20(logits):
    found = []
    for row in logits.tolist():
        top = sorted(row, reverse=True)[:20]
        total = sum(math.exp(z - top[0]) for z in top)
        p = [math.exp(z - top[0]) / total for z in top]
        found.append(-sum(x * math.log(x) for x in p))
    return torch.tensor(found, dtype=torch.float64, device=logits.device)


# name -> options of the fused loss, and the loss of each row from its logits
OBJECTIVES = {
    "dft": (
        {"weighting": "dft"},
        lambda z, y: (
            torch.softmax(z, 1).gather(1, y.clamp(min=0)[:, None])[:, 0].detach() * nll_of(z, y)
        ),
    ),
    "eaft": (
        {"weighting": "eaft", "alpha": 1.5},
        lambda z, y: (entropy_of_20(z) / 3) ** 1.5 * nll_of(z, y),
    ),
    "eaft, unscaled": (
        {"weighting": "eaft_unscaled"},
        lambda z, y: entropy_of_20(z) * nll_of(z, y),
    ),
    "weights of rows": (
        {"row_weights": torch.linspace(0, 2, ROWS, dtype=torch.float64).to(DEVICE)},
        lambda z, y: torch.linspace(0, 2, ROWS, dtype=z.dtype, device=z.device) * nll_of(z, y),
    ),
    "eaft with weights of rows": (
        {
            "weighting": "eaft",
            "row_weights": torch.linspace(0, 2, ROWS, dtype=torch.float64).to(DEVICE),
        },
        lambda z, y: (
            torch.linspace(0, 2, ROWS, dtype=z.dtype, device=z.device)
            * (entropy_of_20(z) / 3)
            * nll_of(z, y)
        ),
    ),
    "label smoothing": (
        {"label_smoothing": 0.2},
        lambda z, y: nll_of(z, y, label_smoothing=0.2),
    ),
    "dft with label smoothing": (
        {"weighting": "dft", "label_smoothing": 0.1},
        lambda z, y: (
            torch.softmax(z, 1).gather(1, y.clamp(min=0)[:, None])[:, 0].detach()
            * nll_of(z, y, label_smoothing=0.1)
        ),
    ),
    "half of ntp": ({"ntp_weight": 0.5}, lambda z, y: 0.5 * nll_of(z, y)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("mixup_weight", [0.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradients_equal_the_definition(
    inputs, objective, mixup_weight, transform, backend
):
    options, definition = OBJECTIVES[objective]
    if not mixup_weight:
        inputs["pairs"], inputs["lam"] = inputs["pairs"][:0], inputs["lam"][:0]
    settings = TRANSFORMS[transform]
    found = fused_linear_mixup_cross_entropy(
        **inputs,
        mixup_weight=mixup_weight,
        num_ntp_tokens=17,
        num_mixup_tokens=5,
        backend=backend,
        **settings,
        **options,
    )
    # Mixup and the plain figures are those of SFTMix, which other tests compare with its definition
    plain = fused_linear_mixup_cross_entropy(
        **inputs,
        mixup_weight=mixup_weight,
        num_ntp_tokens=17,
        num_mixup_tokens=5,
        ntp_weight=0.0,
        backend="reference",
        **settings,
    )
    rows = definition(shown(inputs, **settings), inputs["labels"])
    expected = rows.sum() / 17 + plain.loss
    assert torch.allclose(found.loss, expected, rtol=1e-11)
    assert torch.allclose(found.ntp, plain.ntp) and torch.allclose(found.mixup, plain.mixup)
    assert torch.allclose(found.token_nll, plain.token_nll)
    wanted = [inputs["hidden"], inputs["weight"]]
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-13)


def test_an_ignored_row_without_finite_logits_has_no_weight():
    logits = torch.randn(3, 30)
    logits[1] = float("inf")
    weights = entropy_weights("eaft", 1.0, logits, torch.tensor([4, -100, 2]))
    assert weights[1] == 0 and torch.isfinite(weights).all() and (weights[[0, 2]] > 0).all()


@pytest.mark.parametrize(("name", "value"), [("weighting", "dtf"), ("label_smoothing", 1.0)])
def test_an_unknown_objective_is_refused(inputs, name, value):
    with pytest.raises(ValueError, match="expected one of none, dft, eaft"):
        fused_linear_mixup_cross_entropy(**inputs, **{name: value})


@pytest.mark.parametrize("columns", [20, 21 * GROUP_COLUMNS, 40 * GROUP_COLUMNS + 17])
def test_the_largest_values_are_those_of_a_sort(columns):
    generator = torch.Generator().manual_seed(columns)
    values = torch.randn(50, columns, generator=generator)
    values[10:20] = values[10:20].round()  # many equal ones
    values[20:30] = values[20:30].sort(dim=1).values  # all in the last blocks
    values[30:40, ::3] = -float("inf")
    found = largest(values, 20).sort(dim=1).values
    assert torch.equal(found, values.sort(dim=1).values[:, -20:])
