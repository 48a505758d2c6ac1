"""What a few seeds allow to say about the difference between two arms.

The unit of evidence is a seed: data, initial weights, order and pairs are drawn anew with it. So
the interval of a difference is a paired t interval over seeds. With 5 seeds it covers what it says
for normal and for heavy-tailed differences, and a percentile bootstrap does not
(`tests/evaluation/test_statistics.py` simulates both). Held-out examples are nested in seeds: they
show how well each seed was measured, and give no interval of a result by themselves.

Axes: S seeds, N held-out examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

LEVEL = 0.95  # of intervals
SIGN_FLIP_FROM = 6  # seeds; with 5 its p cannot fall below 2 / 2**5 = 0.0625
MAX_EXACT_SEEDS = 16  # of the sign-flip test: 2**16 assignments


@dataclass(frozen=True)
class Difference:
    """An arm minus its control, paired by seed.

    per_seed: (S,). mean, low, high: with the paired t interval of `LEVEL`; None with one seed.
    p_value: of the paired t test, two-sided. p_holm: the same, adjusted for all comparisons of the
    study (Holm, 1979). effect_size: Hedges' g of paired differences: mean over standard deviation,
    with the correction for few seeds. within: mean over the seeds of the standard error that the
    held-out examples of one seed give; None without per-example figures.
    """

    per_seed: NDArray[np.float64]
    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    p_holm: float | None
    effect_size: float | None
    within: float | None

    @property
    def p_sign_flip(self) -> float | None:
        """p of the sign-flip test; None with fewer than `SIGN_FLIP_FROM` seeds."""
        return sign_flip_p(self.per_seed) if len(self.per_seed) >= SIGN_FLIP_FROM else None


def paired_difference(
    arm: ArrayLike, control: ArrayLike, *, within: Sequence[float] = ()
) -> Difference:
    """Returns the difference of two arms, `p_holm` left out.

    arm, control: (S,) figures by seed, in the same order of seeds. within: standard error of each
    seed's difference over its examples. Raises ValueError for figures that are not finite, or of
    different seeds.
    """
    treated, untreated = np.asarray(arm, dtype=float), np.asarray(control, dtype=float)
    if treated.shape != untreated.shape or treated.ndim != 1 or not len(treated):
        raise ValueError(
            f"expected one figure per seed of both arms, found {treated.shape} and"
            f" {untreated.shape}"
        )
    each = treated - untreated
    if not np.isfinite(each).all():
        raise ValueError(f"figures that are not finite: {each.tolist()}")
    count, mean = len(each), float(each.mean())
    nested = float(np.mean(within)) if len(within) else None
    if count < 2:
        return Difference(each, mean, None, None, None, None, None, nested)
    deviation = float(each.std(ddof=1))
    error = deviation / math.sqrt(count)
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error
    # Differences that are all equal have no spread to compare with: certain, unless they are zero.
    # Not ttest_1samp: it warns on the terminal where they are nearly equal.
    p_value = 2 * float(stats.t.sf(abs(mean) / error, count - 1)) if error > 0 else float(mean == 0)
    correction = 1 - 3 / (4 * (count - 1) - 1) if count > 2 else 1.0
    return Difference(
        each,
        mean,
        mean - half,
        mean + half,
        p_value,
        None,
        correction * mean / deviation if deviation > 0 else None,
        nested,
    )


def sign_flip_p(differences: NDArray[np.float64]) -> float:
    """Returns the two-sided p of the sign-flip test: under no difference each seed's sign is a fair
    coin. Exact up to `MAX_EXACT_SEEDS` seeds, with 100,000 draws of a fixed seed beyond."""
    count = len(differences)
    is_exact = count <= MAX_EXACT_SEEDS
    found = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if is_exact else 100_000,
        rng=np.random.default_rng(0),
        vectorized=True,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values adjusted for several comparisons: at most 5% of studies without any
    difference show one below 0.05 (Holm, 1979)."""
    if not len(p_values):
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


@dataclass(frozen=True)
class Switched:
    """Examples of one seed that only one of two arms answers exactly, and McNemar's exact p."""

    only_arm: int
    only_control: int
    p_value: float


def switched(arm: NDArray[np.bool_], control: NDArray[np.bool_]) -> Switched:
    """Returns McNemar's test of one seed. arm, control: (N,), correct or not, of the same examples.

    It says whether these two trained models differ on examples like these, not whether the methods
    do: that takes several seeds.
    """
    if arm.shape != control.shape:
        raise ValueError(f"expected the same examples, found {arm.shape} and {control.shape}")
    only_arm, only_control = int((arm & ~control).sum()), int((control & ~arm).sum())
    both, neither = int((arm & control).sum()), int((~arm & ~control).sum())
    found = mcnemar([[both, only_arm], [only_control, neither]], exact=True)
    return Switched(only_arm, only_control, float(found.pvalue))


def error_of_ratio(numerators: NDArray[np.float64], counts: NDArray[np.float64]) -> float:
    """Returns the standard error of sum(numerators) / sum(counts) over examples: that of a loss in
    nats per token, where the tokens of one example belong together. Both (N,); linearised (delta
    method). NaN for fewer than two examples."""
    total = counts.sum()
    if len(counts) < 2 or not total:
        return float("nan")
    residual = numerators - numerators.sum() / total * counts
    return float(math.sqrt(len(counts) / (len(counts) - 1) * (residual**2).sum()) / total)


def sentence(arm: str, control: str, difference: Difference, *, better: int, unit: str) -> str:
    """Returns what the data allow to say. better: 1 if higher figures are better, -1 if lower."""
    count = len(difference.per_seed)
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    shown = f"{difference.mean:+.4f} {unit}"
    if difference.low is None or difference.high is None or difference.p_value is None:
        return f"{arm} against {control}: {shown} with one seed, which decides nothing."
    interval = f"95% interval {difference.low:+.4f} to {difference.high:+.4f}, {seeds}"
    p_value = difference.p_value if difference.p_holm is None else difference.p_holm
    if p_value >= 1 - LEVEL:
        return f"{arm} against {control}: no difference shown; {shown} ({interval})."
    word = "better" if difference.mean * better > 0 else "worse"
    return f"{arm} is {word} than {control}: {shown} ({interval}; p = {p_value:.2g})."


@dataclass(frozen=True)
class ItemDifference:
    """One trained model minus another on the same N questions, with its interval of `LEVEL` over
    questions, and McNemar's test where answers are right or wrong (else None)."""

    mean: float
    low: float
    high: float
    switched: Switched | None


def item_difference(arm: ArrayLike, control: ArrayLike) -> ItemDifference:
    """Returns the paired difference of two models. arm, control: (N,), N >= 2, in the same order.

    Right and wrong answers: the interval of Agresti and Min (Statistics in Medicine 24, 2005,
    section 3.2), which adds half a question to each cell of the 2 x 2 table; it covers what it says
    also where the models rarely differ. Other figures: the paired t interval.

    It speaks of these two models and of questions like these. Whether the methods differ takes
    several seeds (`paired_difference`). Raises ValueError for figures of different questions.
    """
    treated, untreated = np.asarray(arm, dtype=float), np.asarray(control, dtype=float)
    if treated.shape != untreated.shape or treated.ndim != 1 or len(treated) < 2:
        raise ValueError(
            f"expected the same questions, two or more, found {treated.shape} and {untreated.shape}"
        )
    each = treated - untreated
    count, mean = len(each), float(each.mean())
    if not (np.isin(treated, (0, 1)) & np.isin(untreated, (0, 1))).all():
        half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * float(stats.sem(each))
        return ItemDifference(mean, mean - half, mean + half, None)
    found = switched(treated == 1, untreated == 1)
    only_arm, only_control, total = found.only_arm + 0.5, found.only_control + 0.5, count + 2
    centre = (only_arm - only_control) / total
    variance = (only_arm + only_control - (only_arm - only_control) ** 2 / total) / total**2
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(variance)
    return ItemDifference(mean, centre - half, centre + half, found)
