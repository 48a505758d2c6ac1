"""Attention within documents against its definition, in float64, with gradients."""

import itertools

import pytest
import torch

from sftmix.kernels.document_attention import document_attention

LENGTHS = (5, 1, 9, 2)


def inputs(*, heads=4, groups=2, value_size=6, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    length = sum(LENGTHS)
    shapes = [(1, heads, length, 8), (1, groups, length, 8), (1, groups, length, value_size)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def bounds():
    return torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)


def alone(query, key, value, *, scale, window, softcap):
    """Each position by itself: its scores, one at a time."""
    starts = bounds().tolist()
    share = query.shape[1] // key.shape[1]
    rows = []
    for start, end in itertools.pairwise(starts):
        for i in range(start, end):
            first = start if window is None else max(start, i - window + 1)
            heads = []
            for head in range(query.shape[1]):
                scores = key[0, head // share, first : i + 1] @ query[0, head, i] * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(torch.softmax(scores, 0) @ value[0, head // share, first : i + 1])
            rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


@pytest.mark.parametrize("backend", ["sdpa", "reference", None])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_output_and_gradients_equal_those_of_each_position_by_itself(
    backend, window, softcap, groups
):
    tensors = inputs(groups=groups)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    expected = alone(*tensors, **options)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors)
    found = document_attention(*tensors, LENGTHS, bounds(), backend=backend, **options)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    got = torch.autograd.grad((found * weight).sum(), tensors)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_default_scale_is_that_of_the_head_size():
    tensors = inputs()
    found = document_attention(*tensors, LENGTHS, bounds())
    expected = alone(*tensors, scale=8**-0.5, window=None, softcap=None)
    assert torch.allclose(found, expected)


def test_dropout_drops_shares_and_keeps_their_mean():
    query, key, _ = inputs()
    ones = torch.ones(1, 2, sum(LENGTHS), 3, dtype=torch.float64)
    torch.manual_seed(0)
    draws = torch.stack(
        [document_attention(query, key, ones, LENGTHS, bounds(), dropout=0.5) for _ in range(400)]
    )
    assert draws.std() > 0.1 and draws.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("lengths", "backend", "message"),
    [
        ((5, 1), None, "the documents have 6 tokens"),
        (LENGTHS, "triton", "unknown backend 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(lengths, backend, message):
    with pytest.raises(ValueError, match=message):
        document_attention(*inputs(), lengths, bounds(), backend=backend)
