"""Results of a study: what each trial measured, and each arm beside the control.

Axes: N held-out examples of a trial.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.evaluation.statistics import (
    Difference,
    Switched,
    error_of_ratio,
    holm,
    paired_difference,
    sentence,
    switched,
)

TRAINED = "train"  # the stage of the one model that a trial trains
OUTCOMES = {"loss": (-1, "nats/token"), "exact_match": (1, "share")}  # which is better, unit


@dataclass(frozen=True)
class Trial:
    """loss: nats per response token. exact_match: share. ids, nll_sum, num_tokens, is_exact: (N,),
    per held-out example. costs: by stage of this trial, "minutes" and, where they are known, real
    "tokens" trained on and "watt_hours"; a shared stage counts in every trial. curve: NTP loss by
    optimiser step, as logged."""

    loss: float
    exact_match: float
    ids: NDArray[np.str_]
    nll_sum: NDArray[np.float64]
    num_tokens: NDArray[np.float64]
    is_exact: NDArray[np.bool_]
    costs: dict[str, dict[str, float]]
    curve: list[tuple[int, float]]
    facts: dict[str, Any]


@dataclass(frozen=True)
class ArmResult:
    """One arm: its trials by seed, and for each outcome its difference to the control over the
    seeds that both have finished (None for the control, and before there is one). switched: McNemar
    by seed, where both were measured on the same examples."""

    name: str
    trials: dict[int, Trial]
    differences: dict[str, Difference | None]
    switched: dict[int, Switched]

    def figures(self, outcome: str) -> list[float]:
        return [getattr(trial, outcome) for trial in self.trials.values()]

    def cost(self, kind: str) -> float | None:
        """Returns the mean over the seeds of a cost of all stages; None where one is not known."""
        costs = [cost for trial in self.trials.values() for cost in trial.costs.values()]
        known = [cost[kind] for cost in costs if kind in cost]
        return sum(known) / len(self.trials) if costs and len(known) == len(costs) else None

    def mean(self, outcome: str) -> float:
        return statistics.fmean(self.figures(outcome))

    def deviation(self, outcome: str) -> float | None:
        """Standard deviation over the seeds; None with one."""
        return statistics.stdev(self.figures(outcome)) if len(self.trials) > 1 else None


def compare(
    trials: Mapping[str, Mapping[int, Trial]], control: str, outcome: str
) -> list[ArmResult]:
    """Returns the results of the arms that have any, the control first. trials: by arm and seed.
    outcome: its p values are adjusted for the number of arms; the other one is for looking."""
    order = [control, *(name for name in trials if name != control)]
    base = trials.get(control, {})
    arms = [
        ArmResult(
            name,
            dict(trials[name]),
            {key: _difference(trials[name], base, key, name != control) for key in OUTCOMES},
            {
                seed: switched(trial.is_exact, base[seed].is_exact)
                for seed, trial in trials[name].items()
                if name != control and seed in base and _same_examples(trial, base[seed])
            },
        )
        for name in order
        if trials.get(name)
    ]
    p_values = {
        arm.name: p_value
        for arm in arms
        if (difference := arm.differences[outcome]) is not None
        and (p_value := difference.p_value) is not None
    }
    adjusted = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    for arm in arms:
        difference = arm.differences[outcome]
        if difference is not None and arm.name in adjusted:
            arm.differences[outcome] = replace(difference, p_holm=adjusted[arm.name])
    return arms


def _difference(
    arm: Mapping[int, Trial], base: Mapping[int, Trial], outcome: str, is_compared: bool
) -> Difference | None:
    seeds = [seed for seed in arm if seed in base]
    if not is_compared or not seeds:
        return None
    pairs = [(arm[seed], base[seed]) for seed in seeds]
    is_nested = all(_same_examples(*pair) for pair in pairs)
    return paired_difference(
        [getattr(one, outcome) for one, _ in pairs],
        [getattr(other, outcome) for _, other in pairs],
        within=[_error_within(*pair, outcome) for pair in pairs] if is_nested else (),
    )


def _same_examples(one: Trial, other: Trial) -> bool:
    return len(one.ids) == len(other.ids) and bool((one.ids == other.ids).all())


def _error_within(one: Trial, other: Trial, outcome: str) -> float:
    if outcome == "loss":
        return error_of_ratio(one.nll_sum - other.nll_sum, one.num_tokens)
    differences = one.is_exact.astype(float) - other.is_exact
    return error_of_ratio(differences, np.ones(len(differences)))


def sentences(arms: Sequence[ArmResult], control: str, outcome: str) -> list[str]:
    """Returns what the data allow to say about each arm."""
    better, unit = OUTCOMES[outcome]
    return [
        sentence(arm.name, control, difference, better=better, unit=unit)
        for arm in arms
        if (difference := arm.differences[outcome]) is not None
    ]


def as_json(arms: Sequence[ArmResult], outcome: str) -> list[dict[str, Any]]:
    """Returns the results as plain values: per arm its figures by seed, and its differences."""
    return [
        {
            "arm": arm.name,
            "seeds": {
                str(seed): {
                    "loss": trial.loss,
                    "exact_match": trial.exact_match,
                    "num_examples": len(trial.ids),
                    "costs": trial.costs,
                }
                for seed, trial in arm.trials.items()
            },
            "differences": {
                key: None
                if (found := arm.differences[key]) is None
                else {
                    **vars(found),
                    "per_seed": found.per_seed.tolist(),
                    "p_sign_flip": found.p_sign_flip,
                    "is_outcome": key == outcome,
                }
                for key in OUTCOMES
            },
            "switched": {str(seed): vars(found) for seed, found in arm.switched.items()},
        }
        for arm in arms
    ]
