"""What only a GPU can show: bf16 and fp16 in Triton, products in float32 accumulators, indices
beyond 2**31, memory, no waiting, graphs. Each result is held against float64 on the same rounded
inputs, beside the textbook form in the same dtype."""

import itertools

import pytest
import torch

import sftmix.kernels.chunked_linear_mixup as chunked
from sftmix.kernels import document_attention
from sftmix.kernels.fused_linear_mixup_cross_entropy import (
    fused_linear_mixup_cross_entropy as loss_of,
)
from sftmix.kernels.linear_token_nll import linear_token_scores
from sftmix.kernels.mixed_embeddings import mixed_embeddings
from sftmix.kernels.mixup_cross_entropy import mixup_cross_entropy
from sftmix.kernels.pair_epilogue import pair_epilogue_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a GPU: these are properties of its arithmetic and memory",
    ),
]
DEVICE = "cuda"
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32 and no half-precision split-K sums: the errors measured are ours."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    )
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = (
        matmul.allow_fp16_reduced_precision_reduction
    ) = False
    yield
    (
        matmul.allow_tf32,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
    ) = before


def draw(
    num_rows=768, hidden_size=256, vocab_size=5003, dtype=torch.bfloat16, confidence=20.0, seed=0
):
    """Hidden states lean towards their labels' rows by amounts from none to `confidence` logits:
    probabilities from 1 / V to 1."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = 0.05 * torch.randn(vocab_size, hidden_size, generator=generator, device=DEVICE)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device=DEVICE)
    lean = (
        confidence
        * torch.rand(num_rows, 1, generator=generator, device=DEVICE)
        / (hidden_size * 0.05**2)
    )
    hidden = lean * weight[labels] + torch.randn(
        num_rows, hidden_size, generator=generator, device=DEVICE
    )
    order = torch.randperm(num_rows, generator=generator, device=DEVICE)
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "bias": (
            (0.1 * torch.randn(vocab_size, generator=generator, device=DEVICE))
            .to(dtype)
            .requires_grad_()
        ),
        "labels": labels,
        "pairs": order[: num_rows // 3 * 2].view(-1, 2),
        "lam": torch.rand(num_rows // 3, generator=generator, device=DEVICE),
    }


def run(inputs, *, upstream=1.0, **options):
    leaves = {
        k: v.detach().clone().requires_grad_()
        for k, v in inputs.items()
        if v is not None and v.is_floating_point() and k != "lam"
    }
    out = loss_of(**{**inputs, **leaves}, **options)
    (out.loss * upstream).backward()
    return out, {name: leaf.grad for name, leaf in leaves.items()}


def in_float64(inputs):
    return {
        k: v.detach().double() if v is not None and v.is_floating_point() and k != "lam" else v
        for k, v in inputs.items()
    }


def error(value, truth):
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(
    "transform",
    [{}, {"logit_scale": 0.25}, {"logit_softcap": 10.0}],
    ids=["plain", "scale", "soft-cap"],
)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows_per_chunk", [128, 1024])
def test_no_further_from_float64_than_the_textbook_in_the_same_dtype(
    rows_per_chunk, backend, dtype, transform, monkeypatch
):
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", rows_per_chunk * 5003 * 4)
    monkeypatch.setattr(chunked, "MIN_CHUNK_ROWS", 2)
    inputs = draw(dtype=dtype)
    inputs["labels"][5::7] = -100
    truth = run(in_float64(inputs), backend="reference", **transform)
    textbook, ours = (
        run(inputs, backend="reference", **transform),
        run(inputs, backend=backend, **transform),
    )
    eps = torch.finfo(dtype).eps
    for name, exact in truth[1].items():
        allowed = 2 * error(textbook[1][name], exact) + eps / 4
        assert error(ours[1][name], exact) <= allowed, name
    assert (
        abs(ours[0].loss.item() - truth[0].loss.item())
        <= 2 * abs(textbook[0].loss.item() - truth[0].loss.item()) + eps
    )
    assert (
        error(ours[0].token_nll, truth[0].token_nll.double())
        <= 2 * error(textbook[0].token_nll, truth[0].token_nll.double()) + eps / 4
    )


def test_gradient_of_a_confident_token_keeps_its_digits():
    """p - 1 formed after rounding p would be 0 or 100% wrong; here, logits straight into the
    epilogue, p from 0.999 to 1 - 1e-6."""
    from sftmix.kernels.pair_epilogue_triton import pair_epilogue

    vocab_size = 4099
    logits = torch.zeros(8, vocab_size, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.arange(8, device=DEVICE) * 511
    for row, doubt in enumerate((1e-3, 1e-4, 1e-5, 1e-6, 3e-3, 3e-4, 3e-5, 3e-6)):
        logits[row, labels[row]] = (
            torch.tensor((vocab_size - 1) * (1 - doubt) / doubt, dtype=torch.float64)
            .log()
            .bfloat16()
        )
    lam = torch.tensor([0.3, 0.0, 1.0, 0.999], device=DEVICE)
    exact = logits.double()
    one = torch.ones((), device=DEVICE)
    pair_epilogue_reference(exact, labels, lam, one.double(), 0.2 * one.double())
    pair_epilogue(logits, labels, lam, one, 0.2 * one)
    ours, exact = (values.double().gather(1, labels[:, None]) for values in (logits, exact))
    # One rounding to bfloat16, and what float32 leaves of p - 1; rounding p first would be wrong by
    # 2e-3.
    assert (
        (ours - exact).abs() <= 0.5 * torch.finfo(torch.bfloat16).eps * exact.abs() + 2.5e-7
    ).all()


def test_without_pairs_it_is_ntp_to_the_bit():
    inputs = draw()
    none = {"pairs": inputs["pairs"][:0], "lam": inputs["lam"][:0]}
    (a, grads_a), (b, grads_b) = (
        run({**inputs, **none}, mixup_weight=0.0),
        run({**inputs, **none}, mixup_weight=0.7),
    )
    assert torch.equal(a.loss, b.loss) and all(
        torch.equal(grads_a[name], grads_b[name]) for name in grads_a
    )


def test_two_runs_are_equal_to_the_bit():
    inputs = draw()
    (a, grads_a), (b, grads_b) = run(inputs), run(inputs)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.token_nll, b.token_nll)
    assert all(torch.equal(grads_a[name], grads_b[name]) for name in grads_a)


@pytest.mark.parametrize("upstream", [1.0, 0.5, -3.0, 2.0**16])
@pytest.mark.parametrize("dtype", HALF)
def test_upstream_gradient_scales_the_result_without_overflow(dtype, upstream):
    inputs = draw(dtype=dtype)
    _, plain = run(inputs, num_ntp_tokens=1e6, num_mixup_tokens=1e6)
    _, scaled = run(inputs, num_ntp_tokens=1e6, num_mixup_tokens=1e6, upstream=upstream)
    _, exact = run(
        in_float64(inputs),
        backend="reference",
        num_ntp_tokens=1e6,
        num_mixup_tokens=1e6,
        upstream=upstream,
    )
    for name, grad in scaled.items():
        assert grad.isfinite().all() and grad.dtype == dtype
        # without a loss scale these gradients are subnormal in float16
        if dtype == torch.bfloat16 or upstream == 2.0**16:
            assert error(grad, exact[name]) < 0.02, name
    assert all(grad.isfinite().all() for grad in plain.values())


def test_nothing_waits_for_the_device():
    inputs = draw()
    counts = {"num_ntp_tokens": 768, "num_mixup_tokens": 256}
    run(inputs, **counts)  # compiled and chosen before the check
    linear_token_scores(inputs["hidden"], inputs["weight"], inputs["labels"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, **counts)
        run(inputs)  # and with its own counts
        linear_token_scores(inputs["hidden"], inputs["weight"], inputs["labels"])
        mixed = mixed_embeddings(inputs["hidden"], inputs["pairs"], inputs["lam"])
        mixup_cross_entropy(
            mixed @ inputs["weight"].T, None, inputs["labels"][inputs["pairs"]], inputs["lam"]
        ).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_replays_on_new_data():
    inputs, other = draw(seed=0), draw(seed=1)
    static = {k: v.detach().clone() for k, v in inputs.items()}
    leaves = {k: static[k].requires_grad_() for k in ("hidden", "weight", "bias")}
    counts = {"num_ntp_tokens": 768, "num_mixup_tokens": 256}

    def step():
        loss = loss_of(**static, **counts).loss
        return loss, torch.autograd.grad(loss, list(leaves.values()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = step()
    with torch.no_grad():
        for name, tensor in other.items():
            static[name].copy_(tensor)
    graph.replay()
    expected, expected_grads = run(other, **counts)
    assert torch.equal(loss, expected.loss)
    assert all(
        torch.equal(grad, expected_grads[name]) for grad, name in zip(grads, leaves, strict=True)
    )


def test_compiled_by_inductor_in_one_graph_it_is_the_same():
    inputs = draw()

    def loss(hidden, weight):
        return loss_of(
            **{**inputs, "hidden": hidden * 1.0, "weight": weight},
            num_ntp_tokens=768,
            num_mixup_tokens=256,
        ).loss

    leaves = [inputs["hidden"], inputs["weight"]]
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), leaves),
        torch.autograd.grad(loss(*leaves), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_under_autocast():
    inputs = draw(dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = loss_of(**inputs)
    out.loss.backward()
    assert inputs["weight"].grad.dtype == torch.float32
    _, exact = run(in_float64(inputs), backend="reference")
    assert error(inputs["weight"].grad, exact["weight"]) < 0.02


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_token_losses(dtype):
    inputs = draw(dtype=dtype)
    exact = in_float64(inputs)
    logits = exact["hidden"] @ exact["weight"].T
    truth = torch.nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")
    nll, match, top_nll = linear_token_scores(inputs["hidden"], inputs["weight"], inputs["labels"])
    rounded = torch.nn.functional.cross_entropy(
        (inputs["hidden"] @ inputs["weight"].T).float(), inputs["labels"], reduction="none"
    )
    assert error(nll, truth) <= 2 * error(rounded.detach(), truth) + torch.finfo(torch.float32).eps
    top = logits.topk(2, dim=1).values
    is_clear = (top[:, 0] - top[:, 1]) > 0.25  # apart by more than the logits are rounded
    assert is_clear.sum() > 200 and torch.equal(
        match[is_clear], (logits.argmax(dim=1) == inputs["labels"])[is_clear]
    )
    likeliest = -torch.log_softmax(logits, dim=1).amax(dim=1)
    assert error(top_nll, likeliest) <= 2 * error(rounded.detach(), truth) + 1e-6


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_the_literal_form_agrees(dtype):
    """Mixed hidden states, the head again, soft-label cross-entropy: in Triton, against float64."""
    inputs = draw(dtype=dtype)
    labels = inputs["labels"][inputs["pairs"]]

    def literal(hidden, weight, backend):
        mixed = mixed_embeddings(hidden, inputs["pairs"], inputs["lam"], backend=backend)
        return mixup_cross_entropy(
            mixed @ weight.T, None, labels, inputs["lam"], backend=backend
        ).mean()

    leaves = [inputs["hidden"], inputs["weight"]]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = literal(*exact, "torch")
    truth_grads = torch.autograd.grad(truth, exact)
    ours, theirs = literal(*leaves, "triton"), literal(*leaves, "torch")
    assert (
        abs(ours.item() - truth.item())
        <= 2 * abs(theirs.item() - truth.item()) + torch.finfo(dtype).eps
    )
    for a, b, t in zip(
        torch.autograd.grad(ours, leaves),
        torch.autograd.grad(theirs, leaves),
        truth_grads,
        strict=True,
    ):
        assert error(a, t) <= 2 * error(b, t) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("is_last_row_alone", [True, False])
def test_indices_beyond_two_to_the_31(is_last_row_alone):
    """16384 x 152064 logits are 2.49e9 elements: the last rows are computed where they are, and no
    others are touched."""
    from sftmix.kernels.pair_epilogue_triton import pair_epilogue

    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    num_rows, vocab_size = 16384, 152064
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.empty(num_rows, vocab_size, device=DEVICE, dtype=torch.bfloat16).normal_(
        generator=generator
    )
    labels = torch.randint(vocab_size, (num_rows,), generator=generator, device=DEVICE)
    num_pairs = num_rows // 2 - (2 if is_last_row_alone else 0)
    lam = torch.rand(num_pairs, generator=generator, device=DEVICE)
    last = logits[-6:].double()
    one = torch.ones((), device=DEVICE)
    nll, mixup, _ = pair_epilogue(logits, labels, lam, one, one)
    pairs_here = num_pairs - (num_rows - 6) // 2
    exact_nll, exact_mixup = pair_epilogue_reference(
        last, labels[-6:], lam[num_pairs - pairs_here :], one.double(), one.double()
    )
    assert torch.allclose(nll[-6:].double(), exact_nll, rtol=1e-5)
    assert torch.allclose(mixup[num_pairs - pairs_here :].double(), exact_mixup, rtol=1e-5)
    assert error(logits[-6:], last) < 4e-3
    assert nll.isfinite().all() and mixup.isfinite().all()


def test_a_weight_of_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of free GPU memory")
    inputs = draw(num_rows=64, hidden_size=8192, vocab_size=262144, confidence=5.0)
    inputs = {**inputs, "bias": None}
    out = loss_of(**inputs)
    out.loss.backward()
    # The gradient of one label's row, by hand; the row is the last of them, beyond 2**31 elements.
    label = int(inputs["labels"].max())
    order = chunked.pair_order(64, inputs["pairs"])
    d_logits = (inputs["hidden"] @ inputs["weight"].T).detach()[order].double()
    one = torch.ones((), device=DEVICE, dtype=torch.float64)
    pair_epilogue_reference(
        d_logits, inputs["labels"][order], inputs["lam"], one / 64, 0.2 * one / len(inputs["lam"])
    )
    exact = d_logits[:, label] @ inputs["hidden"][order].double()
    assert error(inputs["weight"].grad[label], exact) < 0.01


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "vocab_size"), [(8192, 1024, 128256), (16384, 512, 32000)]
)
def test_peak_memory_is_a_slab_of_logits_and_the_gradients(num_rows, hidden_size, vocab_size):
    inputs = {**draw(num_rows, hidden_size, vocab_size), "bias": None}
    counts = {"num_ntp_tokens": num_rows, "num_mixup_tokens": num_rows}
    run(inputs, **counts)  # compiled, workspaces of cuBLAS made
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = loss_of(**inputs, **counts).loss
    rows = max(stop - start for start, stop in chunked.balanced_chunks(num_rows, vocab_size, 2))
    slab, d_weight, d_hidden = (
        2 * rows * vocab_size,
        4 * vocab_size * hidden_size,
        2 * num_rows * hidden_size,
    )
    of_chunk = 2 * 2 * rows * hidden_size
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * (
        slab + d_weight + d_hidden + of_chunk
    )
    del loss


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize(
    ("backend", "window", "softcap"),
    [
        ("varlen", None, None),
        ("varlen", 50, None),
        ("flash", None, None),
        ("flash", 50, 20.0),
        ("flex", None, 20.0),
        ("flex", 50, None),
        ("sdpa", None, None),
        ("sdpa", 50, 20.0),
    ],
)
def test_attention_within_documents(backend, window, softcap, groups, dtype):
    if backend == "flash":
        pytest.importorskip("flash_attn")
    if backend == "varlen" and not document_attention._varlen_has_windows():
        pytest.skip("this torch has no variable-length attention with windows")
    lengths = (130, 1, 257, 64, 60)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def tensor(heads):
        shape = (1, heads, sum(lengths), 64)
        values = torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)
        return values.requires_grad_()

    inputs = [tensor(8), tensor(groups), tensor(groups)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    options = {"window": window, "softcap": softcap}
    results = []
    for tensors, name in ((inputs, backend), (exact, "reference")):
        output = document_attention.document_attention(
            *tensors, lengths, bounds, backend=name, **options
        )
        gradients = torch.autograd.grad(output.sum(dim=(2, 3)).square().sum(), tensors)
        results.append([output, *gradients])
    for found, expected in zip(*results, strict=True):
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < 0.03, float(error)
