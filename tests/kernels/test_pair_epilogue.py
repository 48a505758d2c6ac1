"""Both in-place versions against autograd; the Triton one interpreted where there is no GPU."""

import os
import subprocess
import sys

import pytest
import torch

import sftmix.kernels.pair_epilogue_triton as module
from sftmix.kernels.pair_epilogue import pair_epilogue_reference, pair_epilogue_torch
from sftmix.kernels.pair_epilogue_triton import pair_epilogue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {"torch": pair_epilogue_torch, "triton": pair_epilogue}
IGNORED = -100


def draw(num_rows=7, num_pairs=2, vocab_size=13, dtype=torch.float64, seed=0):
    """Unequal weights, so that a dropped or mistaken factor shows; the row maxima stand in the last
    tile, so that the running sums must be rescaled."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    logits[:, -1] = logits.max() + 1 + torch.arange(num_rows)
    return {
        "logits": logits.to(dtype).to(DEVICE),
        "labels": torch.randint(vocab_size, (num_rows,), generator=generator).to(DEVICE),
        "lam": torch.rand(num_pairs, generator=generator).to(DEVICE),
        "ntp_weight": torch.tensor(0.7, device=DEVICE),
        "mixup_weight": torch.tensor(-1.9, device=DEVICE),
    }


def run_all(version, inputs, **options):
    logits = inputs["logits"].clone()
    losses = version(**{**inputs, "logits": logits}, **options)
    return [tensor.double() for tensor in (*losses, logits)]


def run(version, inputs, **options):
    nll, mixup, _, gradient = run_all(version, inputs, **options)
    return nll, mixup, gradient


def assert_equal(version, inputs, tolerance=1e-12, **options):
    expected = run_all(pair_epilogue_reference, inputs, **options)
    for name, ours, theirs in zip(
        ("nll", "mixup", "mean over the vocabulary", "gradient"),
        run_all(version, inputs, **options),
        expected,
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance), name


CASES = {
    "ragged": {},
    "only pairs": {"num_rows": 6, "num_pairs": 3},
    "no pairs": {"num_pairs": 0},
    "one row": {"num_rows": 1, "num_pairs": 0},
    "one column": {"vocab_size": 1},
    "below a tile": {"vocab_size": 15},
    "a tile": {"vocab_size": 16},
    "one past a tile": {"vocab_size": 17},
    "several tiles and a rest": {"vocab_size": 71},
}
TRANSFORMS = {
    "none": {},
    "scale": {"logit_scale": 0.3},
    "cap": {"logit_softcap": 3.0},
    "both": {"logit_scale": 0.3, "logit_softcap": 3.0},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "MAX_BLOCK", 16)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_autograd(case, transform, version):
    assert_equal(VERSIONS[version], draw(**CASES[case]), **TRANSFORMS[transform])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", ["ragged", "no pairs", "one column", "several tiles and a rest"])
def test_smoothed_labels_and_a_weight_for_each_row(case, transform, version):
    inputs = draw(**CASES[case])
    inputs["ntp_weight"] = torch.linspace(-0.5, 2, len(inputs["labels"]), device=DEVICE)
    inputs["labels"][0] = IGNORED
    for smoothing, by_probability in ((0.0, False), (0.1, False), (0.0, True), (0.7, True)):
        assert_equal(
            VERSIONS[version],
            inputs,
            **TRANSFORMS[transform],
            label_smoothing=smoothing,
            by_probability=by_probability,
        )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("share", [0.0, 1.0, 0.5, 1e-7, 1 - 1e-7])
def test_any_share(share, version):
    inputs = draw()
    assert_equal(
        VERSIONS[version],
        {**inputs, "lam": torch.full_like(inputs["lam"], share, dtype=torch.float64)},
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_tile_of_masked_out_tokens_has_no_part(version):
    inputs = draw(vocab_size=37)
    inputs["labels"] = inputs["labels"].clamp(min=20)
    narrow = {**inputs, "logits": inputs["logits"][:, 20:].clone(), "labels": inputs["labels"] - 20}
    expected = run(pair_epilogue_reference, narrow)
    # all of the first tile, with which the running maximum begins
    inputs["logits"][:, :20] = -float("inf")
    nll, mixup, gradient = run(VERSIONS[version], inputs)
    for a, b in zip((nll, mixup, gradient[:, 20:]), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert not gradient[:, :20].any()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ignored", [[0], [1], [0, 1], [6], list(range(7))])
def test_ignored_rows_leave_exact_zeros(ignored, version):
    inputs = draw()
    inputs["labels"][ignored] = IGNORED
    assert_equal(VERSIONS[version], inputs)
    nll, mixup, gradient = run(VERSIONS[version], inputs)
    assert not nll[ignored].any()
    # a paired row has no mixed part either, as its partner is not mixed
    alone = [row for row in ignored if row >= 4]
    assert not gradient[[*ignored, *alone]].any()
    assert (mixup == 0).tolist() == [bool({0, 1} & set(ignored)), bool({2, 3} & set(ignored))]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_ignored_row_with_infinite_logits_does_not_leak(version):
    inputs = draw()
    inputs["labels"][6] = IGNORED
    inputs["logits"][6] = float("inf")
    _, _, gradient = run(VERSIONS[version], inputs)
    assert not gradient[6].any() and gradient.isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_nan_is_not_hidden(version):
    inputs = draw()
    inputs["logits"][5, 3] = float("nan")
    nll, _, gradient = run(VERSIONS[version], inputs)
    assert nll[5].isnan() and gradient[5].isnan().any() and nll[[0, 1, 2, 3, 4, 6]].isfinite().all()


@pytest.mark.parametrize("version", VERSIONS)
def test_equal_labels_do_not_depend_on_lam_in_the_target(version):
    inputs = draw()
    inputs["labels"][:] = 4
    assert_equal(VERSIONS[version], inputs)


@pytest.mark.parametrize("version", VERSIONS)
def test_confident_tokens_keep_their_gradient(version):
    inputs = draw(dtype=torch.float32)
    # p within 1e-4 of 1: p - 1 must be formed in float32
    inputs["logits"][torch.arange(7), inputs["labels"]] += 9.0
    exact = {**inputs, "logits": inputs["logits"].double()}
    truth = run(pair_epilogue_reference, exact)[2]
    error = (run(VERSIONS[version], inputs)[2] - truth).norm() / truth.norm()
    assert error < 1e-5


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_low_precision_is_as_close_to_float64_as_autograd(dtype, version):
    inputs = draw(vocab_size=71, dtype=dtype)
    exact = {**inputs, "logits": inputs["logits"].double()}
    truth, definition, ours = (
        run(pair_epilogue_reference, exact),
        run(pair_epilogue_reference, inputs),
        run(VERSIONS[version], inputs),
    )
    one_ulp = torch.finfo(torch.float32).eps * inputs["logits"].abs().max().item()
    for t, d, o in zip(truth, definition, ours, strict=True):
        assert (o - t).abs().max() <= 2 * (d - t).abs().max() + one_ulp


@pytest.mark.parametrize("version", VERSIONS)
def test_losses_are_the_same_when_no_gradient_is_wanted(version):
    inputs = draw()
    with_gradient, without = (
        run(VERSIONS[version], inputs),
        run(VERSIONS[version], inputs, want_gradient=False),
    )
    assert torch.equal(with_gradient[0], without[0]) and torch.equal(with_gradient[1], without[1])


def test_rows_far_apart_in_memory_are_found():
    """The offset of the last row exceeds int32; the interpreter wraps as a GPU would."""
    inputs = draw(num_rows=2, num_pairs=1)
    if DEVICE == "cpu":
        stride = 2**31 // 8 + 16
        # as_strided over a sparse file keeps this free of real memory
        storage = torch.empty(1, dtype=torch.float64)
        import tempfile

        with tempfile.NamedTemporaryFile() as file:
            file.truncate((stride + 16) * 8)
            storage = torch.from_file(file.name, shared=True, size=stride + 16, dtype=torch.float64)
            far = storage.as_strided((2, 13), (stride, 1))
            far.copy_(inputs["logits"])
            near = run(pair_epilogue, inputs)
            nll, mixup, _ = pair_epilogue(**{**inputs, "logits": far})
            assert (
                torch.equal(nll.double(), near[0])
                and torch.equal(mixup.double(), near[1])
                and torch.equal(far, near[2])
            )


def test_triton_without_a_gpu_is_refused_with_the_remedy():
    if DEVICE == "cuda":
        pytest.skip("there is a GPU")
    code = (
        "import torch; from sftmix.kernels.fused_linear_mixup_cross_entropy import"
        " fused_linear_mixup_cross_entropy as f;f(torch.ones(2, 3), torch.ones(5, 3),"
        " torch.zeros(2, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0),"
        " backend='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert (
        done.returncode == 1
        and "needs a GPU" in done.stderr
        and 'Use backend="torch"' in done.stderr
    )


BEYOND_INT32 = """
import torch
from sftmix.kernels.pair_epilogue_triton import pair_epilogue
torch.manual_seed(0)
STRIDE = 2**30  # the third row begins at 2**31: in 32 bits its offset would be negative
try:
    # Address space: only the rows' own pages are ever touched.
    storage = torch.empty(4 * STRIDE, dtype=torch.float16)
except RuntimeError as error:
    print("SKIP", error)
    raise SystemExit
one = torch.ones(())
for num_pairs in (2, 0):
    compact, labels = torch.randn(4, 9).half(), torch.tensor([1, 0, 8, 3])
    lam = torch.rand(num_pairs)
    spread = storage.as_strided((4, 9), (STRIDE, 1)).copy_(compact)
    results = [pair_epilogue(logits, labels, lam, one, one) for logits in (compact, spread)]
    assert all(torch.equal(a, b) for a, b in zip(*results)) and torch.equal(compact, spread)
"""


def test_rows_beyond_two_to_the_31_elements():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BEYOND_INT32],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.stdout.startswith("SKIP"):
        pytest.skip(f"no 8 GiB of address space: {done.stdout}")
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-1000:]}"
