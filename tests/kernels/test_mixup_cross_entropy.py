"""Both versions against autograd on one-hot soft labels in float64; the Triton one interpreted
where there is no GPU."""

import os
import subprocess
import sys
import tempfile

import pytest
import torch

import sftmix.kernels.mixup_cross_entropy_triton as module
from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy
from sftmix.kernels.mixed_embeddings import mixed_embeddings
from sftmix.kernels.mixup_cross_entropy import mixup_cross_entropy
from sftmix.kernels.pair_epilogue import pair_epilogue_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100
LOGITS = ("confident_logits", "unconfident_logits")
BACKENDS = ["torch", "triton"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 16)


def draw(num_pairs=5, vocab_size=13, dtype=torch.float64, seed=0):
    """The row maxima stand in the last tile, so that the running sums must be rescaled."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, num_pairs, vocab_size, generator=generator, dtype=torch.float64)
    if num_pairs:
        logits[..., -1] = logits.max() + 1 + torch.arange(num_pairs)
    return {
        "confident_logits": logits[0].to(dtype).to(DEVICE),
        "unconfident_logits": logits[1].to(dtype).to(DEVICE),
        "labels": torch.randint(vocab_size, (num_pairs, 2), generator=generator).to(DEVICE),
        "lam": torch.rand(num_pairs, generator=generator).to(DEVICE),
    }


def truth(confident_logits, unconfident_logits, labels, lam, logit_scale=None, logit_softcap=None):
    """The definition pair by pair, with a one-hot target; a pair with an ignored member takes no
    part at all."""
    losses = []
    for i, (y_c, y_u) in enumerate(labels.tolist()):
        if IGNORED in (y_c, y_u):
            losses.append(0 * confident_logits[i].sum())
            continue
        share = lam[i].to(confident_logits.dtype)
        mixed = confident_logits[i]
        if unconfident_logits is not None:
            mixed = share * mixed + (1 - share) * unconfident_logits[i]
        logits = mixed * (1 if logit_scale is None else logit_scale)
        logits = (
            logits if logit_softcap is None else logit_softcap * (logits / logit_softcap).tanh()
        )
        identity = torch.eye(len(mixed), dtype=mixed.dtype, device=mixed.device)
        target = share * identity[y_c] + (1 - share) * identity[y_u]
        losses.append(torch.nn.functional.cross_entropy(logits[None], target[None]))
    return torch.stack(losses) if losses else confident_logits.sum(dim=1)


def upstream_of(loss):  # unequal, and one of them 0
    return torch.tensor([-1.9, -0.9, 0.0, 1.1, 2.0], dtype=loss.dtype, device=loss.device)[
        torch.arange(len(loss)) % 5
    ]


def run(function, inputs, **options):
    names = [name for name in LOGITS if inputs[name] is not None]
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    loss = function(**{**inputs, **leaves}, **options)
    gradients = torch.autograd.grad(
        loss, leaves.values(), upstream_of(loss), allow_unused=True, materialize_grads=True
    )
    return loss.detach().double(), *(gradient.double() for gradient in gradients)


def assert_equal(ours, expected, tolerance=1e-12):
    for name, a, b in zip(("loss", "d_confident", "d_unconfident"), ours, expected, strict=False):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance), name
    assert len(ours) == len(expected)


CASES = {
    "plain": {},
    "one pair": {"num_pairs": 1},
    "one column": {"vocab_size": 1},
    "below a tile": {"vocab_size": 15},
    "a tile": {"vocab_size": 16},
    "one past a tile": {"vocab_size": 17},
    "several tiles and a rest": {"vocab_size": 71},
    "mixed already": {"unconfident_logits": None},
    "equal labels": {"labels": torch.full((5, 2), 4)},
    "int32 labels": {
        "labels": torch.tensor([[0, 12], [3, 3], [IGNORED, 1], [7, 2], [12, 0]], dtype=torch.int32)
    },
    "any share": {"lam": torch.tensor([0.0, 1.0, 0.5, 1e-7, 1 - 1e-7])},
    "any share, mixed already": {
        "lam": torch.tensor([0.0, 1.0, 0.5, 1e-7, 1 - 1e-7]),
        "unconfident_logits": None,
    },
    "ignored members": {
        "labels": torch.tensor([[IGNORED, 1], [2, IGNORED], [IGNORED, IGNORED], [3, 4], [5, 5]])
    },
    "all ignored": {"labels": torch.full((5, 2), IGNORED)},
}
TRANSFORMS = {
    "none": {},
    "scale": {"logit_scale": 0.3},
    "cap": {"logit_softcap": 3.0},
    "both": {"logit_scale": 0.3, "logit_softcap": 3.0},
}


def of_case(case, **options):
    sizes = {k: v for k, v in CASES[case].items() if k in ("num_pairs", "vocab_size")}
    given = {
        k: None if v is None else v.to(DEVICE) for k, v in CASES[case].items() if k not in sizes
    }
    return {**draw(**sizes, **options), **given}


@both_backends
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_autograd_on_soft_labels(case, transform, backend):
    inputs = of_case(case)
    assert_equal(
        run(mixup_cross_entropy, inputs, backend=backend, **TRANSFORMS[transform]),
        run(truth, inputs, **TRANSFORMS[transform]),
    )


@both_backends
@pytest.mark.parametrize("transform", ["none", "both"])
@pytest.mark.parametrize("case", ["plain", "mixed already"])
def test_gradients_pass_gradcheck(case, transform, backend, monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 4)
    inputs = {**draw(num_pairs=2, vocab_size=5), **CASES[case]}
    logits = [inputs.pop(name) for name in LOGITS]
    leaves = [tensor.requires_grad_() for tensor in logits if tensor is not None]

    def losses(confident, unconfident=None):
        return mixup_cross_entropy(
            confident, unconfident, **inputs, **TRANSFORMS[transform], backend=backend
        )

    assert torch.autograd.gradcheck(losses, leaves)


@both_backends
def test_members_are_not_mistaken_for_each_other(backend):
    inputs = draw()
    swapped = {**inputs, "labels": inputs["labels"].flip(1)}
    assert not torch.allclose(
        run(mixup_cross_entropy, inputs, backend=backend)[0],
        run(mixup_cross_entropy, swapped, backend=backend)[0],
    )


# of numpy in the interpreter: infinities are the point
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@both_backends
@pytest.mark.parametrize("infinity", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("mixed_already", [False, True])
def test_logits_of_an_ignored_pair_do_not_leak(infinity, mixed_already, backend):
    inputs = draw()
    inputs["labels"][1, 0] = inputs["labels"][3, 1] = IGNORED
    if mixed_already:
        inputs["unconfident_logits"] = None
    expected = run(truth, inputs)
    for name in LOGITS:
        if inputs[name] is not None:
            inputs[name][[1, 3]] = infinity
    ours = run(mixup_cross_entropy, inputs, backend=backend)
    assert_equal(ours, expected)
    assert all(not tensor[[1, 3]].any() for tensor in ours)


@both_backends
def test_a_nan_is_not_hidden(backend):
    inputs = draw()
    inputs["unconfident_logits"][3, 4] = float("nan")
    loss, *gradients = run(mixup_cross_entropy, inputs, backend=backend)
    assert loss.isnan().tolist() == [False, False, False, True, False]
    assert all(
        gradient[3].isnan().all() and gradient[[0, 1, 2, 4]].isfinite().all()
        for gradient in gradients
    )


@both_backends
def test_a_tile_of_masked_out_columns_has_no_part(backend):
    inputs = draw(vocab_size=37)
    inputs["labels"] = inputs["labels"].clamp(min=20)
    narrow = {
        **inputs,
        **{name: inputs[name][:, 20:] for name in LOGITS},
        "labels": inputs["labels"] - 20,
    }
    for name in LOGITS:
        # all of the first tile, with which the running maximum begins
        inputs[name][:, :20] = -float("inf")
    loss, *gradients = run(mixup_cross_entropy, inputs, backend=backend)
    assert_equal((loss, *(gradient[:, 20:] for gradient in gradients)), run(truth, narrow))
    assert not any(gradient[:, :20].any() for gradient in gradients)


def test_triton_reads_no_label_outside_the_vocabulary():
    inputs = draw()
    inputs["labels"][0, 0], inputs["labels"][2, 1] = 2**40, -(2**40)
    loss = mixup_cross_entropy(**inputs, backend="triton")
    assert loss.isnan().tolist() == [True, False, True, False, False]


@both_backends
def test_mixed_already_equals_the_same_tensor_twice(backend):
    inputs = draw()
    loss, d_confident, d_unconfident = run(
        mixup_cross_entropy,
        {**inputs, "unconfident_logits": inputs["confident_logits"]},
        backend=backend,
    )
    mixed = run(mixup_cross_entropy, {**inputs, "unconfident_logits": None}, backend=backend)
    assert_equal((loss, d_confident + d_unconfident), mixed)


@both_backends
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_agrees_with_the_mixup_part_of_the_pair_epilogue(transform, backend):
    inputs = draw()
    inputs["labels"][2, 1] = IGNORED
    rows = torch.stack([inputs["confident_logits"], inputs["unconfident_logits"]], dim=1).reshape(
        10, 13
    )
    weights = [torch.tensor(weight, device=DEVICE) for weight in (0.0, 1.0)]
    options = {"logit_scale": 1.0, **TRANSFORMS[transform]}
    _, expected, _ = pair_epilogue_reference(
        rows, inputs["labels"].reshape(-1), inputs["lam"], *weights, **options
    )  # overwrites the rows
    loss, *gradients = run(mixup_cross_entropy, inputs, backend=backend, **TRANSFORMS[transform])
    upstream = upstream_of(loss)[:, None]
    assert_equal((loss, *gradients), (expected, upstream * rows[0::2], upstream * rows[1::2]))


@both_backends
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_mixing_before_the_head_equals_the_mixup_part_of_the_fused_loss(transform, backend):
    generator = torch.Generator().manual_seed(0)
    shapes = ((11, 5), (7, 5), (7,))
    hidden, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64).to(DEVICE).requires_grad_()
        for s in shapes
    )
    labels = torch.randint(7, (11,), generator=generator).to(DEVICE)
    pairs, lam = (
        torch.randperm(11, generator=generator)[:8].view(4, 2).to(DEVICE),
        torch.rand(4, generator=generator).to(DEVICE),
    )
    labels[pairs[1, 0]] = IGNORED

    def fused(mixup_weight):
        options = {
            "mixup_weight": mixup_weight,
            "bias": bias,
            "backend": "reference",
            **TRANSFORMS[transform],
        }
        out = fused_linear_mixup_cross_entropy(hidden, weight, labels, pairs, lam, **options)
        return out.mixup, torch.autograd.grad(out.loss, (hidden, weight, bias))

    (mixup, with_mixup), (_, without) = fused(0.7), fused(0.0)
    logits = torch.nn.functional.linear(
        mixed_embeddings(hidden, pairs, lam, backend=backend), weight, bias
    )
    loss = (
        mixup_cross_entropy(
            logits, None, labels[pairs], lam, backend=backend, **TRANSFORMS[transform]
        ).sum()
        / 3
    )
    assert torch.allclose(loss, mixup, rtol=1e-12)
    for ours, first, second in zip(
        torch.autograd.grad(loss, (hidden, weight, bias)), with_mixup, without, strict=True
    ):
        assert torch.allclose(0.7 * ours, first - second, rtol=1e-11, atol=1e-13)


@both_backends
def test_upstream_gradient_may_have_any_strides(backend):
    inputs = draw()
    leaves = [inputs[name].requires_grad_() for name in LOGITS]
    loss = mixup_cross_entropy(**inputs, backend=backend)
    ones = torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)
    expanded = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
    apart = torch.autograd.grad(
        loss,
        leaves,
        torch.ones(5, 3, dtype=loss.dtype, device=DEVICE)[:, 0] * upstream_of(loss),
        retain_graph=True,
    )
    strided = torch.autograd.grad(
        loss, leaves, torch.stack([upstream_of(loss), torch.full_like(loss, 9.0)], dim=1)[:, 0]
    )
    assert all(map(torch.equal, ones, expanded)) and all(map(torch.equal, apart, strided))


@both_backends
def test_a_retained_graph_gives_the_same_again_and_the_arguments_are_left_alone(backend):
    inputs = draw()
    leaves = [inputs[name].requires_grad_() for name in LOGITS]
    before = [leaf.detach().clone() for leaf in leaves]
    loss = mixup_cross_entropy(**inputs, backend=backend)
    first = torch.autograd.grad(loss, leaves, upstream_of(loss), retain_graph=True)
    second = torch.autograd.grad(loss, leaves, -2 * upstream_of(loss))
    assert all(torch.equal(-2 * a, b) for a, b in zip(first, second, strict=True))
    assert all(map(torch.equal, leaves, before))


@both_backends
@pytest.mark.parametrize("mixed_already", [False, True])
def test_no_pair_gives_no_loss_and_no_gradient_and_starts_no_kernel(
    mixed_already, backend, monkeypatch
):
    for kernel in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(module, kernel, None)
    inputs = {**draw(num_pairs=0), **({"unconfident_logits": None} if mixed_already else {})}
    loss, *gradients = run(mixup_cross_entropy, inputs, backend=backend)
    assert loss.shape == (0,) and all(gradient.shape == (0, 13) for gradient in gradients)


LAYOUTS = {
    "every second row": lambda t: torch.stack([t, t.new_full(t.shape, 9)], dim=1)[:, 0],
    "every second column": lambda t: torch.stack([t, t.new_full(t.shape, 9)], dim=-1)[..., 0],
    "transposed": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
}


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["confident_logits", "unconfident_logits", "labels", "lam"])
def test_arguments_may_have_any_strides(name, layout, backend):
    inputs = draw()
    inputs["lam"] = inputs["lam"].double()  # no conversion, which would copy
    # one alone: a stride mistaken for that of another must show
    strided = {**inputs, name: LAYOUTS[layout](inputs[name])}
    leaves = [strided[n].detach().requires_grad_() for n in LOGITS]
    loss = mixup_cross_entropy(*leaves, strided["labels"], strided["lam"], backend=backend)
    assert_equal((loss, *torch.autograd.grad(loss, leaves, upstream_of(loss))), run(truth, inputs))


@both_backends
@pytest.mark.parametrize("frozen", LOGITS)
def test_a_frozen_member_changes_nothing_for_the_other(frozen, backend):
    inputs = draw()
    expected = run(mixup_cross_entropy, inputs, backend=backend)[
        1 if frozen == "unconfident_logits" else 2
    ]
    (trained,) = set(LOGITS) - {frozen}
    inputs[trained].requires_grad_()
    loss = mixup_cross_entropy(**inputs, backend=backend)
    loss.backward(upstream_of(loss))
    assert torch.equal(inputs[trained].grad, expected) and inputs[frozen].grad is None


@both_backends
def test_lam_gets_no_gradient(backend):
    inputs = draw()
    inputs["lam"].requires_grad_()
    inputs["confident_logits"].requires_grad_()
    mixup_cross_entropy(**inputs, backend=backend).sum().backward()
    assert inputs["lam"].grad is None and inputs["confident_logits"].grad is not None


# The interpreter truncates where a GPU rounds to bfloat16, and computes wrongly in it.
LOW = [
    (b, d)
    for b in BACKENDS
    for d in (torch.float32, torch.float16, torch.bfloat16)
    if (b, d, DEVICE) != ("triton", torch.bfloat16, "cpu")
]


@pytest.mark.parametrize(("backend", "dtype"), LOW)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("members", [LOGITS, LOGITS[:1]])
def test_low_precision_is_as_close_to_float64_as_the_definition_in_float32(
    members, transform, backend, dtype
):
    inputs = {
        **draw(vocab_size=71, dtype=dtype),
        **({} if members == LOGITS else {"unconfident_logits": None}),
    }
    # rounded to bfloat16 it is 1, and in float16 the rest is wrong by 2 percent
    inputs["lam"][0] = 0.999
    double, single = (
        {**inputs, **{n: inputs[n].to(d) for n in members}} for d in (torch.float64, torch.float32)
    )
    exact, definition = (run(truth, given, **TRANSFORMS[transform]) for given in (double, single))
    ours = run(mixup_cross_entropy, inputs, backend=backend, **TRANSFORMS[transform])
    one_ulp = torch.finfo(torch.float32).eps * inputs["confident_logits"].abs().max().item()
    assert (ours[0] - exact[0]).abs().max() <= 2 * (definition[0] - exact[0]).abs().max() + one_ulp
    rounding = torch.finfo(dtype).eps + one_ulp
    # what float16 rounds away near 0
    smallest = 71**0.5 * (2.0**-25 if dtype == torch.float16 else 0.0)
    for e, d, o in zip(exact[1:], definition[1:], ours[1:], strict=True):
        assert (
            (o - e).norm(dim=1) <= 2 * (d - e).norm(dim=1) + rounding * e.norm(dim=1) + smallest
        ).all()


@both_backends
def test_large_logits_do_not_cancel(backend):
    inputs = {**draw(dtype=torch.float32), "unconfident_logits": None}
    shifted = {
        **inputs,
        "confident_logits": (inputs["confident_logits"] * 256).round() / 256 + 4096,
    }  # exact in float32
    exact = run(truth, {**shifted, "confident_logits": shifted["confident_logits"].double()})
    assert_equal(run(mixup_cross_entropy, shifted, backend=backend), exact, tolerance=2e-6)


@both_backends
def test_likely_tokens_keep_their_gradient(backend):
    inputs = draw(dtype=torch.float32)
    inputs["labels"][:, 1] = inputs["labels"][:, 0]
    for name in LOGITS:
        # p within 1e-3 of 1: p - 1 must be formed in float32
        inputs[name][torch.arange(5), inputs["labels"][:, 0]] += 14
    exact = run(truth, {**inputs, **{n: inputs[n].double() for n in LOGITS}})
    for o, e in zip(run(mixup_cross_entropy, inputs, backend=backend), exact, strict=True):
        assert (o - e).norm() < 2e-3 * e.norm()


def test_rows_far_apart_in_memory_are_found():
    """The offset of the last row exceeds int32; the interpreter wraps as a GPU would."""
    if DEVICE == "cuda":
        pytest.skip("a sparse file stands for the memory, which only a CPU can read")
    # the stride itself fits int32, twice the stride does not
    inputs, stride = draw(num_pairs=3, dtype=torch.float16), 2**30 + 16
    near = run(mixup_cross_entropy, inputs, backend="triton")
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * (2 * stride + 16))
        storage = torch.from_file(file.name, shared=True, size=2 * stride + 16, dtype=torch.float16)
        for name in LOGITS:
            far = (
                storage.as_strided((3, 13), (stride, 1))
                .copy_(inputs[name])
                .detach()
                .requires_grad_()
            )
            leaves = [far if n == name else inputs[n].detach().requires_grad_() for n in LOGITS]
            loss = mixup_cross_entropy(*leaves, inputs["labels"], inputs["lam"], backend="triton")
            ours = (loss, *torch.autograd.grad(loss, leaves, upstream_of(loss)))
            assert all(torch.equal(o.double(), n) for o, n in zip(ours, near, strict=True))


@both_backends
@pytest.mark.parametrize("mixed_already", [False, True])
def test_compiles_in_one_graph(mixed_already, backend):
    inputs = {**draw(), **({"unconfident_logits": None} if mixed_already else {})}

    def loss_of(**arguments):
        return (
            mixup_cross_entropy(**arguments, logit_scale=0.3, logit_softcap=3.0, backend=backend)
            + 1.0
        )

    assert_equal(
        run(torch.compile(loss_of, backend="aot_eager", fullgraph=True), inputs),
        run(loss_of, inputs),
    )


@pytest.mark.parametrize("mixed_already", [False, True])
def test_operators_keep_the_contract_of_custom_operators(mixed_already):
    inputs = {**draw(), **({"unconfident_logits": None} if mixed_already else {})}
    arguments = (*inputs.values(), 0.3, 3.0, IGNORED)
    torch.library.opcheck(
        module.mixup_backward,
        (*arguments, *module.mixup_forward(*arguments)[1:], inputs["lam"].double(), True, False),
    )
    inputs["confident_logits"].requires_grad_()
    torch.library.opcheck(module.mixup_forward, arguments)


def test_second_derivative_is_right_or_refused():
    inputs = draw(num_pairs=2, vocab_size=4)
    leaves = [inputs.pop(name).requires_grad_() for name in LOGITS]
    assert torch.autograd.gradgradcheck(
        lambda *logits: mixup_cross_entropy(*logits, **inputs, backend="torch"), leaves
    )
    loss = mixup_cross_entropy(*leaves, **inputs, backend="triton")
    (gradient,) = torch.autograd.grad(loss.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='has no second derivative. Use backend="torch"'):
        gradient.sum().backward()


@both_backends
def test_nothing_waits_for_the_device(backend):
    # a tensor without numbers: whatever asks for one raises
    inputs = {name: tensor.to("meta") for name, tensor in draw().items()}
    inputs["confident_logits"].requires_grad_()
    mixup_cross_entropy(**inputs, backend=backend).sum().backward()
    assert inputs["confident_logits"].grad.shape == (5, 13)


class OnGpu(torch.Tensor):
    is_cuda = True


def test_default_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "mixup_forward", lambda *_: ["triton"])
    inputs = {name: tensor.cpu() for name, tensor in draw().items()}
    assert torch.equal(
        mixup_cross_entropy(**inputs), mixup_cross_entropy(**inputs, backend="torch")
    )
    assert (
        mixup_cross_entropy(
            **{**inputs, "confident_logits": inputs["confident_logits"].as_subclass(OnGpu)}
        )
        == "triton"
    )


WRONG = {
    "one dimension": {"confident_logits": torch.zeros(13)},
    "another vocabulary": {"unconfident_logits": torch.zeros(5, 12)},
    "two dtypes": {"unconfident_logits": torch.zeros(5, 13, dtype=torch.float16)},
    "integer logits": {
        "confident_logits": torch.zeros(5, 13, dtype=torch.int64),
        "unconfident_logits": None,
    },
    "labels of one member": {"labels": torch.zeros(5, dtype=torch.int64)},
    "more labels than pairs": {"labels": torch.zeros(6, 2, dtype=torch.int64)},
    "labels that are not integers": {"labels": torch.zeros(5, 2)},
    "one lam for all": {"lam": torch.tensor(0.5)},
    "lam in low precision": {"lam": torch.zeros(5, dtype=torch.bfloat16)},
}


@both_backends
@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit_are_refused(case, backend):
    with pytest.raises(
        ValueError, match="mixup_cross_entropy found confident_logits .* expected confident_logits"
    ):
        mixup_cross_entropy(**{**draw(dtype=torch.float32), **WRONG[case]}, backend=backend)


def test_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match="unknown backend 'cuda': expected one of torch, triton, reference"
    ):
        mixup_cross_entropy(**draw(), backend="cuda")


def test_triton_without_a_gpu_is_refused_and_torch_does_not_load_it():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    code = (
        "import sys, torch; from sftmix.kernels.mixup_cross_entropy import mixup_cross_entropy as"
        " f;a = torch.ones(2, 3), None, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2);f(*a);"
        " print('triton' in sys.modules, flush=True); f(*a, backend='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.stdout.split() == ["False"] and done.returncode == 1
    assert (
        "ValueError" in done.stderr
        and "needs a GPU" in done.stderr
        and 'Use backend="torch"' in done.stderr
    )


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from sftmix.kernels.fused_linear_mixup_cross_entropy import fused_linear_mixup_cross_entropy
from sftmix.kernels.linear_token_nll import linear_token_nll
from sftmix.kernels.mixed_embeddings import mixed_embeddings
from sftmix.kernels.mixup_cross_entropy import mixup_cross_entropy
rows, weight, labels = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, dtype=torch.int64)
pair, lam = torch.tensor([[0, 1]]), torch.ones(1)
for function, arguments in (
    (fused_linear_mixup_cross_entropy, (rows, weight, labels, pair, lam)),
    (linear_token_nll, (rows, weight, labels)),
    (mixed_embeddings, (rows, pair, lam)),
    (mixup_cross_entropy, (rows[:1], rows[1:], labels[None], lam)),
):
    function(*arguments)
    try:
        function(*arguments, backend="triton")
    except ImportError as error:
        print(error)
"""


def test_without_the_package_triton_torch_works_and_triton_is_refused_in_one_line():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 4, done.stdout + done.stderr
    assert all(
        "needs the package triton" in line and 'use backend="torch"' in line for line in lines
    )
