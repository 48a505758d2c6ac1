from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sftmix.pairing.permutation import permute, symmetric_beta, uniform


def p_value(
    counts: NDArray[np.float64], expected: NDArray[np.float64] | float, freedom: int | None = None
) -> float:
    """Chi-square test, with Wilson and Hilferty's normal approximation of the tail."""
    statistic, k = (
        float(((counts - expected) ** 2 / expected).sum()),
        counts.size - 1 if freedom is None else freedom,
    )
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


def permutations(n: int, count: int, *key: int | str) -> NDArray[np.int64]:
    return permute(
        np.tile(np.arange(n), count), n, *key, tweak=np.repeat(np.arange(count), n)
    ).reshape(count, n)


def test_is_one_to_one_on_every_short_range() -> None:
    for n in range(1, 2001):
        indices = np.arange(n)
        moved = permute(indices, n, "test", n)
        assert np.array_equal(np.sort(moved), indices), n


@pytest.mark.parametrize("n", [10**6, 2**26 + 1, 10**8, 10**9 + 7, 2**40 + 15, 2**48])
def test_is_one_to_one_on_long_ranges(n: int) -> None:
    indices = np.unique(np.r_[0, n - 1, np.random.default_rng(n).integers(0, n, 20_000)])
    moved = permute(indices, n, "test")
    assert moved.min() >= 0 and moved.max() < n and len(np.unique(moved)) == len(indices)
    assert not np.array_equal(np.sort(moved), indices)


def test_any_part_in_any_shape_equals_the_whole() -> None:
    whole = permute(np.arange(100_003), 100_003, 7, 0)
    pieces = [
        permute(np.arange(a, min(a + 777, 100_003)), 100_003, 7, 0) for a in range(0, 100_003, 777)
    ]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(
        permute(np.arange(6).reshape(2, 3), 100_003, 7, 0), whole[:6].reshape(2, 3)
    )
    assert permute(np.arange(0), 0, 1).size == 0


def test_refuses_what_is_outside_the_range() -> None:
    for indices in ([5], [-1]):
        with pytest.raises(ValueError, match=r"in \[0, 5\)"):
            permute(np.array(indices), 5, 1)


def test_known_answers_do_not_change() -> None:
    # A change here changes what every finished run would be repeated with.
    assert permute(np.arange(8), 8, "pairs", 0, 0).tolist() == KNOWN_SHORT
    assert permute(np.arange(4), 10**8, "pairs", np.int64(0), np.int32(0)).tolist() == KNOWN_LONG
    assert symmetric_beta(np.arange(2), 0.5, "lam", 0, 0).tolist() == pytest.approx(
        KNOWN_BETA, rel=1e-12
    )


KNOWN_SHORT = [5, 1, 6, 0, 7, 3, 2, 4]
LONG = pytest.mark.torture
KNOWN_LONG = [57698199, 81068731, 28460915, 20490294]
KNOWN_BETA = [0.439536364529057, 0.48123141307195416]


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=LONG), 4, pytest.param(5, marks=LONG)])
def test_all_permutations_of_few_are_equally_likely_over_keys(n: int) -> None:
    codes = {order: code for code, order in enumerate(itertools.permutations(range(n)))}
    counts = np.zeros(len(codes))
    for seed in range(12_000):
        counts[codes[tuple(permute(np.arange(n), n, "keys", seed, 3).tolist())]] += 1
    assert p_value(counts, 12_000 / len(codes)) > 1e-4


@pytest.mark.parametrize("n", [5, 7])
def test_all_permutations_of_few_are_equally_likely_over_tweaks(n: int) -> None:
    orders = permutations(n, 300_000, "tweaks")
    counts = np.bincount(
        np.unique((orders * n ** np.arange(n)).sum(axis=1), return_inverse=True)[1]
    ).astype(float)
    assert len(counts) == math.factorial(n)
    assert p_value(counts, 300_000 / len(counts)) > 1e-4


@pytest.mark.parametrize("n", [9, 30, 64, 1030])
def test_where_neighbours_go_is_uniform_and_independent(n: int) -> None:
    count = 2_000_000 // n
    orders = permutations(n, count, "neighbours")
    bins = min(n, 30)
    first, second = orders[:, 0], orders[:, 1]
    gap = (second - first) % n  # uniform on 1..n-1 for a random permutation
    if n <= 64:
        assert p_value(np.bincount(gap, minlength=n)[1:].astype(float), count / (n - 1)) > 1e-4
    position = np.zeros((bins, bins))
    np.add.at(position, (np.tile(np.arange(n), count) * bins // n, orders.ravel() * bins // n), 1)
    size = np.bincount(np.arange(n) * bins // n).astype(float)
    # Rows and columns have fixed sums, hence (bins - 1)^2 degrees of freedom, and the variance of
    # sampling without replacement.
    statistic_scale = n / (n - 1)
    expected = count * np.outer(size, size) / n
    assert (
        p_value(
            expected + (position - expected) / math.sqrt(statistic_scale), expected, (bins - 1) ** 2
        )
        > 1e-4
    )
    fixed = np.bincount(np.minimum((orders == np.arange(n)).sum(axis=1), 4), minlength=5).astype(
        float
    )
    poisson = np.array([math.exp(-1) / math.factorial(k) for k in range(4)])
    assert p_value(fixed, count * np.append(poisson, 1 - poisson.sum())) > 1e-4


def test_both_parities_occur() -> None:
    # odd squares: an odd base for both digits would reach even permutations only
    for n in (9, 25, 49):
        orders = permutations(n, 2000, "parity")
        inversions = (orders[:, :, None] > orders[:, None, :])[
            :, np.triu(np.ones((n, n), dtype=bool), 1)
        ].sum(axis=1)
        assert abs((inversions % 2).mean() - 0.5) < 0.05


@pytest.mark.parametrize("other", [("a", 0, 1), ("a", 1, 0), ("b", 0, 0), ("a", 0, 0, 0)])
def test_neighbouring_keys_are_unrelated(other: tuple[int | str, ...]) -> None:
    n = 40_000
    one, two = permute(np.arange(n), n, "a", 0, 0), permute(np.arange(n), n, *other)
    assert (one == two).sum() < 12  # Poisson with mean 1
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(n)
    joint = np.bincount(one * 20 // n * 20 + two * 20 // n, minlength=400).astype(float)
    assert p_value(joint, n / 400, 19**2) > 1e-4


def test_uniform_numbers() -> None:
    numbers = uniform(np.arange(400_000), "u", 1)
    assert numbers.min() > 0 and numbers.max() < 1
    assert (
        p_value(np.bincount((numbers * 1000).astype(int), minlength=1000).astype(float), 400) > 1e-4
    )
    assert (
        p_value(
            np.bincount(
                (numbers[:-1] * 20).astype(int) * 20 + (numbers[1:] * 20).astype(int)
            ).astype(float),
            399_999 / 400,
        )
        > 1e-4
    )
    assert abs(np.corrcoef(numbers, uniform(np.arange(400_000), "u", 2))[0, 1]) < 5 / math.sqrt(
        400_000
    )


def test_beta_half_is_the_arcsine_law() -> None:
    draws = np.sort(symmetric_beta(np.arange(200_000), 0.5, 1))
    law = 2 / np.pi * np.arcsin(np.sqrt(draws))
    # Kolmogorov-Smirnov, p about 1e-4
    assert np.abs(law - (np.arange(200_000) + 0.5) / 200_000).max() < 2.2 / math.sqrt(200_000)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 2.0, 3.7, 50.0])
def test_beta_has_the_law_of_numpys(alpha: float) -> None:
    ours = np.sort(symmetric_beta(np.arange(200_000), alpha, "lam", 4))
    theirs = np.sort(np.random.default_rng(4).beta(alpha, alpha, 200_000))
    grid = np.sort(np.r_[ours, theirs])
    distance = (
        np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right")).max()
        / 200_000
    )
    assert distance < 2.2 * math.sqrt(2 / 200_000)
    for power in (2, 4):  # central moments: 1 / (4 (2a + 1)), and 3 / (16 (2a + 1)(2a + 3))
        exact = (
            1 / (4 * (2 * alpha + 1))
            if power == 2
            else 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
        )
        moments = (ours - 0.5) ** power
        assert abs(moments.mean() - exact) < 5 * moments.std() / math.sqrt(200_000) + 1e-15
    assert ours.min() >= 0 and ours.max() <= 1 and np.isfinite(ours).all()


def test_beta_keeps_small_draws_apart() -> None:
    draws = symmetric_beta(np.arange(100_000), 0.05, 9)
    small = draws[draws < 1e-10]
    assert len(small) > 10_000 and len(np.unique(small)) == len(small)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_beta_refuses_other_alphas(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        symmetric_beta(np.arange(3), alpha, 1)
