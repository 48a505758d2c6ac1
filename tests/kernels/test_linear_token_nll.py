import pytest
import torch

import sftmix.kernels.linear_token_nll as module
from sftmix.kernels.linear_token_nll import linear_token_nll, linear_token_nll_and_match


@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.3}, {"logit_softcap": 2.0}])
@pytest.mark.parametrize("rows_per_chunk", [2, 1000])
def test_equals_cross_entropy_on_all_logits(transform, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "WORKSPACE_BYTES", rows_per_chunk * 13 * 8)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 4, generator=generator).double(), torch.randn(13, 4, generator=generator).double()
    bias, labels = torch.randn(13, generator=generator).double(), torch.randint(13, (9,), generator=generator)
    labels[3] = -100
    logits = (hidden @ weight.T + bias) * transform.get("logit_scale", 1.0)
    cap = transform.get("logit_softcap")
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    nll, match = linear_token_nll_and_match(hidden, weight, labels, bias, **transform)
    assert torch.allclose(nll, expected.float(), rtol=1e-6)
    assert nll[3] == 0 and not match[3]
    assert torch.equal(match, logits.argmax(dim=1) == labels)
    assert torch.equal(nll, linear_token_nll(hidden, weight, labels, bias, **transform))


def test_no_rows():
    assert linear_token_nll(torch.zeros(0, 4), torch.ones(5, 4), torch.zeros(0, dtype=torch.int64)).shape == (0,)
