"""Both versions against rows interpolated one by one under autograd; the Triton one interpreted
where there is no GPU."""

import tempfile

import pytest
import torch

import sftmix.kernels.mixed_embeddings_triton as module
from sftmix.kernels.mixed_embeddings import inverse_maps, mixed_embeddings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
# Row 3 is in two pairs, once as each member; row 7 is in a pair with itself; rows 1 and 8 are in
# none.
PAIRS = torch.tensor([[0, 3], [7, 7], [3, 5], [6, 2], [4, 0]])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 16)


def draw(pairs=PAIRS, hidden_size=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "embeddings": (
            torch.randn(9, hidden_size, generator=generator, dtype=torch.float64)
            .to(dtype)
            .to(DEVICE)
        ),
        "pairs": pairs.to(DEVICE),
        "lam": torch.rand(len(pairs), generator=generator).to(DEVICE),
    }


def truth(embeddings, pairs, lam):
    rows = [
        lam[i].to(embeddings.dtype) * embeddings[c]
        + (1 - lam[i].to(embeddings.dtype)) * embeddings[u]
        for i, (c, u) in enumerate(pairs)
    ]
    return torch.stack(rows) if rows else embeddings[:0]


def upstream_of(mixed):
    upstream = torch.randn(
        mixed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(mixed)
    return (
        upstream.index_fill(0, torch.arange(len(mixed), device=mixed.device)[1:2], 0.0)
        if len(mixed) > 3
        else upstream
    )


def run(function, inputs, **options):
    leaf = inputs["embeddings"].detach().clone().requires_grad_()
    mixed = function(**{**inputs, "embeddings": leaf}, **options)
    (gradient,) = torch.autograd.grad(mixed, leaf, upstream_of(mixed))
    assert mixed.dtype == gradient.dtype == leaf.dtype
    return mixed.detach(), gradient


def assert_equal(ours, expected, tolerance=1e-14):
    for name, a, b in zip(("mixed", "gradient"), ours, expected, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance), name


CASES = {
    "plain": {},
    "one column": {"hidden_size": 1},
    "below a tile": {"hidden_size": 15},
    "a tile": {"hidden_size": 16},
    "one past a tile": {"hidden_size": 17},
    "several tiles and a rest": {"hidden_size": 71},
    "no pair": {"pairs": PAIRS[:0]},
    "one pair": {"pairs": PAIRS[:1]},
    "rows alone": {"pairs": torch.tensor([[7, 7], [0, 0], [3, 3]])},
    "every row in both columns": {
        "pairs": torch.stack([torch.arange(9), torch.arange(9).roll(1)], dim=1)
    },
    "int32 pairs": {"pairs": PAIRS.int()},
}
SHARES = {"drawn": None, "any": torch.tensor([0.0, 1.0, 0.5, 1e-7, 1 - 1e-7])}


@both_backends
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_equal_autograd(case, share, backend):
    inputs = draw(**CASES[case])
    if SHARES[share] is not None:
        inputs["lam"] = SHARES[share].to(DEVICE)[torch.arange(len(inputs["lam"])) % 5]
    assert_equal(run(mixed_embeddings, inputs, backend=backend), run(truth, inputs))


@both_backends
def test_gradients_pass_gradcheck(backend):
    inputs = draw(hidden_size=3)
    assert torch.autograd.gradcheck(
        lambda e: mixed_embeddings(**{**inputs, "embeddings": e}, backend=backend),
        inputs["embeddings"].requires_grad_(),
    )


# The interpreter truncates where a GPU rounds to bfloat16.
LOW = [
    (b, d)
    for b in BACKENDS
    for d in (torch.float16, torch.bfloat16)
    if (b, d, DEVICE) != ("triton", torch.bfloat16, "cpu")
]


@pytest.mark.parametrize(("backend", "dtype"), LOW)
def test_low_precision_is_interpolated_in_float32_and_rounded_once(backend, dtype):
    inputs = draw(hidden_size=71, dtype=dtype)
    inputs["lam"][0] = 0.999  # rounded to bfloat16 it is 1
    mixed, gradient = run(mixed_embeddings, inputs, backend=backend)
    exact = {**inputs, "embeddings": inputs["embeddings"].double().requires_grad_()}
    exact_mixed = truth(**exact)
    (exact_gradient,) = torch.autograd.grad(
        exact_mixed, exact["embeddings"], upstream_of(mixed).double()
    )
    for ours, theirs in ((mixed, exact_mixed), (gradient, exact_gradient)):
        half_ulp = torch.finfo(dtype).eps / 2 * theirs.abs() + (
            2.0**-25 if dtype == torch.float16 else 0.0
        )
        assert (
            (ours.double() - theirs).abs() <= 1.001 * half_ulp + 1e-6 * theirs.abs().max()
        ).all()


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_paired_with_itself_comes_out_bit_for_bit(dtype, backend):
    inputs = draw(pairs=torch.arange(9)[:, None].expand(9, 2), hidden_size=71, dtype=dtype)
    mixed, gradient = run(mixed_embeddings, inputs, backend=backend)
    assert torch.equal(mixed, inputs["embeddings"]) and torch.equal(gradient, upstream_of(mixed))


# of numpy in the interpreter: infinities are the point
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@both_backends
def test_rows_in_no_pair_get_exact_zeros_whatever_the_gradient_is(backend):
    inputs = draw()
    inputs["embeddings"].requires_grad_()
    mixed = mixed_embeddings(**inputs, backend=backend)
    mixed.backward(torch.full_like(mixed, float("inf")))
    assert (
        not inputs["embeddings"].grad[[1, 8]].any()
        and inputs["embeddings"].grad[[0, 2, 3, 4, 5, 6, 7]].all()
    )


@both_backends
def test_no_pair_gives_exact_zeros_and_starts_no_kernel(backend, monkeypatch):
    for kernel in ("_forward_kernel", "_backward_kernel"):
        monkeypatch.setattr(module, kernel, None)
    mixed, gradient = run(mixed_embeddings, draw(pairs=PAIRS[:0]), backend=backend)
    assert mixed.shape == (0, 5) and gradient.shape == (9, 5) and not gradient.any()


@both_backends
def test_members_are_not_mistaken_for_each_other(backend):
    inputs = draw()
    swapped = {**inputs, "pairs": inputs["pairs"].flip(1)}
    assert not torch.allclose(
        run(mixed_embeddings, inputs, backend=backend)[0],
        run(mixed_embeddings, swapped, backend=backend)[0],
    )


REPEATED = {
    "confident": torch.tensor([[4, 3], [2, 2], [4, 1]]),
    "unconfident": torch.tensor([[0, 4], [2, 2], [3, 4]]),
}


@both_backends
@pytest.mark.parametrize("member", REPEATED)
def test_a_row_twice_in_a_column_is_refused(member, backend):
    inputs = draw(pairs=REPEATED[member])
    if DEVICE == "cpu":  # on a GPU the assertion ends the process
        with pytest.raises(ValueError, match=f"row 4 is the {member} member of more than one pair"):
            mixed_embeddings(**inputs, backend=backend)
        with pytest.raises(
            RuntimeError, match=f"a row is the {member} member of more than one pair"
        ):
            torch.compile(mixed_embeddings, backend="aot_eager", fullgraph=True)(
                **inputs, backend=backend
            )


@both_backends
@pytest.mark.parametrize("row", [-1, 9])
def test_a_row_that_is_not_there_is_refused(row, backend):
    if DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError), match="out of range|out of bounds"):
            mixed_embeddings(**draw(pairs=torch.tensor([[0, 1], [row, 2]])), backend=backend)


@both_backends
def test_nothing_waits_for_the_device(backend):
    # a tensor without numbers: whatever asks for one raises
    inputs = {name: tensor.to("meta") for name, tensor in draw().items()}
    leaf = inputs["embeddings"].requires_grad_()
    mixed = mixed_embeddings(**inputs, backend=backend)
    mixed.sum().backward()
    assert mixed.shape == (5, 5) and leaf.grad.shape == (9, 5)
    with pytest.raises(RuntimeError, match="meta"):  # the test of the test
        bool(inverse_maps(inputs["pairs"], 9).any())


class OnGpu(torch.Tensor):
    is_cuda = True


def test_default_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch):
    monkeypatch.setattr(module, "mixed_forward", lambda *_: "triton")
    inputs = {name: tensor.cpu() for name, tensor in draw().items()}
    assert torch.equal(mixed_embeddings(**inputs), mixed_embeddings(**inputs, backend="torch"))
    assert (
        mixed_embeddings(**{**inputs, "embeddings": inputs["embeddings"].as_subclass(OnGpu)})
        == "triton"
    )


LAYOUTS = {
    "every second row": lambda t: torch.stack([t, t.new_full(t.shape, 1)], dim=1)[:, 0],
    "every second column": lambda t: torch.stack([t, t.new_full(t.shape, 1)], dim=-1)[..., 0],
    "transposed": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
}


@both_backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_arguments_and_upstream_gradient_may_have_any_strides(layout, backend):
    inputs = draw()
    strided = {name: LAYOUTS[layout](tensor) for name, tensor in inputs.items()}
    leaf = strided["embeddings"].requires_grad_()
    mixed = mixed_embeddings(leaf, strided["pairs"], strided["lam"], backend=backend)
    assert leaf.stride() != inputs["embeddings"].stride()
    assert_equal(
        (mixed, *torch.autograd.grad(mixed, leaf, LAYOUTS[layout](upstream_of(mixed)))),
        run(truth, inputs),
    )


@both_backends
def test_upstream_gradient_may_be_one_number(backend):
    inputs = draw()
    leaf = inputs["embeddings"].requires_grad_()
    expanded, plain = (
        torch.autograd.grad(f(**inputs).sum(), leaf)[0]
        for f in (lambda **i: mixed_embeddings(**i, backend=backend), truth)
    )
    assert torch.allclose(expanded, plain, rtol=1e-14)


@both_backends
def test_a_retained_graph_gives_the_same_again_and_the_arguments_are_left_alone(backend):
    inputs = draw()
    leaf, before = inputs["embeddings"].requires_grad_(), inputs["embeddings"].detach().clone()
    mixed = mixed_embeddings(**inputs, backend=backend)
    (first,) = torch.autograd.grad(mixed, leaf, upstream_of(mixed), retain_graph=True)
    (second,) = torch.autograd.grad(mixed, leaf, -2 * upstream_of(mixed))
    assert torch.equal(-2 * first, second) and torch.equal(leaf, before)


@both_backends
def test_lam_gets_no_gradient_and_frozen_embeddings_none(backend):
    inputs = draw()
    inputs["lam"].requires_grad_()
    assert not mixed_embeddings(**inputs, backend=backend).requires_grad
    mixed_embeddings(
        **{**inputs, "embeddings": inputs["embeddings"].requires_grad_()}, backend=backend
    ).sum().backward()
    assert inputs["lam"].grad is None and inputs["embeddings"].grad is not None


@pytest.mark.parametrize("rows", ["embeddings", "upstream"])
def test_rows_far_apart_in_memory_are_found(rows):
    """The offset of the last row exceeds int32; the interpreter wraps as a GPU would."""
    if DEVICE == "cuda":
        pytest.skip("a sparse file stands for the memory, which only a CPU can read")
    inputs = draw(
        pairs=torch.tensor([[1, 0], [0, 2], [2, 1]], dtype=torch.int32), dtype=torch.float16
    )
    # the stride itself fits int32, twice the stride does not
    inputs["embeddings"], stride = inputs["embeddings"][:3], 2**30 + 16
    near = run(mixed_embeddings, inputs, backend="triton")
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * (2 * stride + 16))
        storage = torch.from_file(file.name, shared=True, size=2 * stride + 16, dtype=torch.float16)
        far = storage.as_strided((3, 5), (stride, 1))
        leaf = (
            inputs["embeddings"] if rows == "upstream" else far.copy_(inputs["embeddings"]).detach()
        )
        mixed = mixed_embeddings(
            leaf.requires_grad_(), inputs["pairs"], inputs["lam"], backend="triton"
        )
        upstream = upstream_of(mixed) if rows == "embeddings" else far.copy_(upstream_of(mixed))
        assert_equal((mixed, *torch.autograd.grad(mixed, leaf, upstream)), near, tolerance=0)


@both_backends
def test_compiles_in_one_graph(backend):
    def twice(**arguments):
        return 2 * mixed_embeddings(**arguments, backend=backend)

    assert_equal(
        run(torch.compile(twice, backend="aot_eager", fullgraph=True), draw()), run(twice, draw())
    )


def test_operators_keep_the_contract_of_custom_operators():
    inputs = draw()
    slots, lam, upstream = (
        inverse_maps(inputs["pairs"], 9),
        inputs["lam"].double(),
        upstream_of(inputs["embeddings"][:5]),
    )
    # a compiler may choose the strides
    for layout in (lambda t: t, LAYOUTS["every second column"]):
        forward = (
            inputs["embeddings"].requires_grad_(),
            inputs["pairs"],
            layout(lam),
            layout(slots),
        )
        torch.library.opcheck(module.mixed_forward, forward)
        torch.library.opcheck(module.mixed_backward, (upstream, *forward[2:]))
        assert_equal(
            (module.mixed_forward(*forward), module.mixed_backward(upstream, *forward[2:])),
            run(truth, inputs),
        )


def test_second_derivative_is_right_or_refused():
    inputs = draw(hidden_size=2)
    leaf = inputs.pop("embeddings").requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda e: mixed_embeddings(e, **inputs, backend="torch"), leaf
    )
    (gradient,) = torch.autograd.grad(
        mixed_embeddings(leaf, **inputs, backend="triton").square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match='has no second derivative. Use backend="torch"'):
        gradient.sum().backward()


WRONG = {
    "one dimension": {"embeddings": torch.zeros(5)},
    "integer embeddings": {"embeddings": torch.zeros(9, 5, dtype=torch.int64)},
    "pairs of one member": {"pairs": torch.zeros(5, dtype=torch.int64)},
    "pairs that are not integers": {"pairs": torch.zeros(5, 2)},
    "fewer shares than pairs": {"lam": torch.zeros(4)},
    "one lam for all": {"lam": torch.tensor(0.5)},
    "lam in low precision": {"lam": torch.zeros(5, dtype=torch.bfloat16)},
}


@both_backends
@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_do_not_fit_are_refused(case, backend):
    with pytest.raises(
        ValueError, match="mixed_embeddings found embeddings .* expected embeddings"
    ):
        mixed_embeddings(**{**draw(), **WRONG[case]}, backend=backend)


def test_unknown_backend_is_refused():
    with pytest.raises(
        ValueError, match="unknown backend 'cuda': expected one of torch, triton, reference"
    ):
        mixed_embeddings(**draw(), backend="cuda")


def test_triton_without_a_gpu_is_refused_with_the_remedy(monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    import sftmix.kernels.pair_epilogue_triton as where_it_is_asked

    monkeypatch.setattr(where_it_is_asked, "INTERPRETED", False)
    with pytest.raises(
        ValueError, match='needs a GPU, and the tensors are on cpu. Use backend="torch"'
    ):
        mixed_embeddings(**draw(), backend="triton")
