import pytest
import torch

import sftmix.kernels.chunked_linear_mixup as module
from sftmix.kernels.linear_token_nll import linear_token_nll, linear_token_scores


@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.3}, {"logit_softcap": 2.0}])
@pytest.mark.parametrize("rows_per_chunk", [2, 1000])
@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_equals_cross_entropy_on_all_logits(backend, transform, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", rows_per_chunk * 13 * 8)
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 2)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(9, 4, generator=generator).double(),
        torch.randn(13, 4, generator=generator).double(),
    )
    bias, labels = (
        torch.randn(13, generator=generator).double(),
        torch.randint(13, (9,), generator=generator),
    )
    labels[3] = -100
    logits = (hidden @ weight.T + bias) * transform.get("logit_scale", 1.0)
    cap = transform.get("logit_softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    nll, match, top_nll = linear_token_scores(
        hidden, weight, labels, bias, **transform, backend=backend
    )
    assert torch.allclose(nll, expected.float(), rtol=1e-6)
    assert nll[3] == 0 and not match[3]
    assert torch.equal(match, logits.argmax(dim=1) == labels)
    likeliest = -torch.log_softmax(logits, dim=1).amax(dim=1)
    assert top_nll[3] == 0 and torch.allclose(
        top_nll[labels >= 0], likeliest[labels >= 0].float(), rtol=1e-6
    )
    assert torch.equal(top_nll[match], nll[match])
    assert torch.equal(
        nll, linear_token_nll(hidden, weight, labels, bias, **transform, backend=backend)
    )


def test_no_rows():
    assert linear_token_nll(
        torch.zeros(0, 4), torch.ones(5, 4), torch.zeros(0, dtype=torch.int64)
    ).shape == (0,)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_float32_and_match_is_false_where_another_token_is_likelier(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip(
            "Triton's interpreter computes bfloat16 wrongly; tests/kernels/test_gpu.py has it"
        )
    weight = torch.eye(4, dtype=dtype)
    hidden = torch.tensor([[0.0, 3.0, 1.0, 0.0], [2.0, 0.0, 0.0, 1.0]], dtype=dtype)
    nll, match, top_nll = linear_token_scores(hidden, weight, torch.tensor([1, 3]), backend=backend)
    assert nll.dtype == top_nll.dtype == torch.float32 and match.tolist() == [True, False]
    assert torch.allclose(
        nll,
        torch.nn.functional.cross_entropy(hidden.float(), torch.tensor([1, 3]), reduction="none"),
        rtol=1e-5,
    )


def test_compiled_in_one_graph_it_is_the_same():
    hidden, weight, labels = torch.randn(5, 3), torch.randn(7, 3), torch.tensor([0, 6, 2, -100, 1])
    compiled = torch.compile(linear_token_nll, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(hidden, weight, labels), linear_token_nll(hidden, weight, labels))


@pytest.mark.parametrize("label", [7, -1])
def test_label_outside_the_vocabulary_is_refused(label):
    with pytest.raises(ValueError, match=f"label {label} in row 1"):
        linear_token_nll(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([0, label]))
