"""Results of tasks side by side: each model's figures, and their paired differences to the first.

`results.json`: {"models": [name, ...], "control": name, "tasks": {task: {model: result}},
"differences": [...]}; a result is one of `harness.Harness.measure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from statsmodels.stats.proportion import proportion_confint

from sftmix.evaluation.statistics import LEVEL, holm, item_difference

TITLES = ["task", "metric", "questions"]
FIGURES = f"In per cent. Of the first model also the {LEVEL:.0%} interval over questions (Wilson)."
DIFFERENCES = (
    f"In brackets: the {LEVEL:.0%} interval of the difference to the first model, in points, paired"
    " by question; p: McNemar's exact test, adjusted for all comparisons of the table (Holm). They"
    " speak of these trained models on questions like these. Whether one method is better takes"
    " several seeds of each."
)
# of a metric of the harness: the one that others repeat where answers have one length
REPEATED = {"acc_norm": "acc"}

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]  # task -> model -> result


def differences(results: Results, models: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row for every task, metric and model after the first: its difference to the first,
    with interval, and p values where answers are right or wrong."""
    control, *others = models
    rows: list[dict[str, Any]] = []
    for task, found in results.items():
        for metric in compared(found[control]):
            first = {row["item"]: row[metric] for row in found[control]["items"]}
            for model in others:
                second = {row["item"]: row[metric] for row in found[model]["items"]}
                both = [item for item in first if item in second]
                if len(both) < 2:
                    continue
                pair = item_difference([second[i] for i in both], [first[i] for i in both])
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "model": model,
                        "num_items": len(both),
                        "difference": pair.mean,
                        "low": pair.low,
                        "high": pair.high,
                        "only_this": pair.switched and pair.switched.only_arm,
                        "only_control": pair.switched and pair.switched.only_control,
                        "p": pair.switched and pair.switched.p_value,
                    }
                )
    tested = [row for row in rows if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return rows


def compared(result: Mapping[str, Any]) -> list[str]:
    """Returns the metrics that are means over questions, without those that repeat another."""
    names = [name for name, metric in result["metrics"].items() if metric["is_mean"]]
    values = {name: [row[name] for row in result["items"]] for name in names}
    return [
        name
        for name in names
        if values[name] != values.get(_repeated(name)) or _repeated(name) == name
    ]


def _repeated(name: str) -> str:
    metric, _, filtered = name.partition(",")
    return f"{REPEATED.get(metric, metric)},{filtered}"


def table(
    results: Results, models: Sequence[str], pairs: Sequence[Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and a row of text per task and metric."""
    found = {(row["task"], row["metric"], row["model"]): row for row in pairs}
    rows = []
    for task, by_model in results.items():
        first = by_model[models[0]]
        for metric in compared(first):
            cells = [task, metric.removesuffix(",none"), f"{first['num_items']:,}"]
            for model in models:
                cells.append(f"{100 * by_model[model]['metrics'][metric]['value']:.1f}")
                if model == models[0]:
                    cells[-1] += _interval([row[metric] for row in first["items"]])
                if (pair := found.get((task, metric, model))) is not None:
                    p_value = "" if pair["p"] is None else f", p {pair['p_holm']:.2g}"
                    low, high = 100 * pair["low"], 100 * pair["high"]
                    cells[-1] += f" [{low:+.1f}, {high:+.1f}{p_value}]"
            rows.append(cells)
    return [*TITLES, *models], rows


def _interval(correct: Sequence[float]) -> str:
    if not set(correct) <= {0.0, 1.0}:
        return ""
    low, high = proportion_confint(sum(correct), len(correct), alpha=1 - LEVEL, method="wilson")
    return f" ({100 * low:.1f} to {100 * high:.1f})"


def note(models: Sequence[str]) -> str:
    """Returns what the numbers of the table mean."""
    return f"{FIGURES} {DIFFERENCES}" if len(models) > 1 else FIGURES
