"""The table and the page of a study, written anew after each trial."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sftmix.config.reader import dump_config
from sftmix.config.study import Study
from sftmix.errors import counted
from sftmix.evaluation import plots
from sftmix.evaluation.page import aligned, markdown, render
from sftmix.evaluation.statistics import Difference
from sftmix.storage.files import write_json, write_text
from sftmix.studies.results import OUTCOMES, ArmResult, as_json, sentences

TITLES = "arm|seeds|loss|difference|exact match|difference".split("|")
# kind -> its column, and how a figure is written
COSTS = {
    "minutes": ("min", "{:.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "watt_hours": ("Wh", "{:,.3g}"),
}
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
NOTES = [
    "Loss: nats per response token of held-out examples, lower is better. Exact match: share of"
    " held-out responses that greedy decoding would produce, higher is better. Both: mean"
    f" {PLUS_MINUS} standard deviation over the seeds. min, tokens, Wh: minutes, tokens without"
    " padding and energy (where the hardware counts it) of training a trial's models, with Mixup"
    " the reference included.",
    "Difference: to the control, paired by seed, with its 95% t interval over the seeds. The"
    " examples of one seed say how well that seed was measured; they are no further evidence.",
]
SEED_TITLES = ["arm", "seed", "loss", "exact match", "only this arm exact", "only control", "p"]
# of the trials; several values where trials differ
FACTS = "device versions commit precision num_parameters world_size date".split()
POINTS = "#7f9fb5"  # seen on white and on black
WIDTH = 78


def write_results(
    study: Study,
    results: Sequence[ArmResult],
    failed: Mapping[tuple[str, int], str],
    *,
    command: str,
) -> None:
    """Writes results.json, results.md and index.html into the study's folder. failed: why trials
    failed. command: that makes them again."""
    settings = study.settings
    settings.dir.mkdir(parents=True, exist_ok=True)
    said = sentences(results, settings.control, settings.outcome)
    titles, rows = table_of(results)
    failures = [f"{arm}, seed {seed} failed: {text}" for (arm, seed), text in failed.items()]
    done = sum(len(arm.trials) for arm in results)
    progress = f"{done} of {counted(len(study.arms) * len(settings.seeds), 'trial')} finished."
    facts = _facts(results, command)
    write_json(
        settings.dir / "results.json",
        {
            **dict(facts),
            "outcome": settings.outcome,
            "control": settings.control,
            "sentences": said,
            "failed": failures,
            "arms": as_json(results, settings.outcome),
        },
    )
    notes = [*NOTES, _adjusted(results, settings.outcome)]
    text = [*said, "", progress, *failures, "", markdown(titles, rows), *notes]
    write_text(settings.dir / "results.md", "\n".join(text) + "\n")
    page = render(
        "sftmix.studies",
        "study.html.j2",
        title=settings.dir.name,
        sentences=said,
        progress=progress,
        failed=failures,
        titles=titles,
        table=rows,
        notes=notes,
        figures=_figures(results, settings.outcome),
        seed_titles=SEED_TITLES,
        seeds=[row for arm in results for row in _seed_rows(arm)],
        models=_models(study, results),
        arms=[(name, json.dumps(arm) if arm else "none") for name, arm in settings.arms.items()],
        facts=facts,
        control=settings.control,
        config=dump_config(study.arms[settings.control]),
    )
    write_text(settings.dir / "index.html", page)


def print_results(study: Study, results: Sequence[ArmResult]) -> None:
    """Prints the table, and what the data allow to say."""
    print("", *aligned(*table_of(results)), "", sep="\n")
    for line in sentences(results, study.settings.control, study.settings.outcome):
        print(textwrap.fill(line, WIDTH))


def table_of(results: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles of the table and a row per arm. A cost that no arm knows has no column."""
    known = [kind for kind in COSTS if any(arm.cost(kind) is not None for arm in results)]
    return TITLES + [COSTS[kind][0] for kind in known], [_row_of(arm, known) for arm in results]


def _row_of(arm: ArmResult, costs: Sequence[str]) -> list[str]:
    loss, match = arm.deviation("loss"), arm.deviation("exact_match")
    return [
        arm.name,
        str(len(arm.trials)),
        f"{arm.mean('loss'):.4f}" + ("" if loss is None else f" {PLUS_MINUS} {loss:.4f}"),
        _shown(arm.differences["loss"], 1, 4),
        f"{arm.mean('exact_match'):.1%}"
        + ("" if match is None else f" {PLUS_MINUS} {100 * match:.1f}"),
        _shown(arm.differences["exact_match"], 100, 1),
        *(
            "-" if (cost := arm.cost(kind)) is None else COSTS[kind][1].format(cost)
            for kind in costs
        ),
    ]


def _shown(difference: Difference | None, factor: float, digits: int) -> str:
    if difference is None:
        return "-"
    mean = f"{factor * difference.mean:+.{digits}f}"
    if difference.low is None or difference.high is None:
        return mean
    low, high = factor * difference.low, factor * difference.high
    return f"{mean} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _adjusted(results: Sequence[ArmResult], outcome: str) -> str:
    found = [
        f"{arm.name} p = {difference.p_value:.2g}, adjusted {difference.p_holm:.2g}"
        + ("" if difference.p_sign_flip is None else f", sign flip {difference.p_sign_flip:.2g}")
        + ("" if difference.effect_size is None else f", Hedges' g {difference.effect_size:+.2f}")
        for arm in results
        if (difference := arm.differences[outcome]) is not None
        and difference.p_value is not None
        and difference.p_holm is not None
    ]
    return (
        f"The outcome of this study is {outcome.replace('_', ' ')}; p of the paired t test,"
        f" adjusted for {counted(len(found), 'comparison')} (Holm):"
        f" {'; '.join(found) or 'none yet'}."
    )


def _seed_rows(arm: ArmResult) -> list[list[str]]:
    rows = []
    for seed, trial in arm.trials.items():
        found = arm.switched.get(seed)
        counts = (
            ["-", "-", "-"]
            if found is None
            else [str(found.only_arm), str(found.only_control), f"{found.p_value:.2g}"]
        )
        rows.append([arm.name, str(seed), f"{trial.loss:.4f}", f"{trial.exact_match:.1%}", *counts])
    return rows


def _models(study: Study, results: Sequence[ArmResult]) -> list[tuple[str, str]]:
    """Returns the name and the folder of the model of each trial that still has one."""
    base = study.settings.dir
    folders = {
        f"{arm.name}, seed {seed}": study.folder(arm.name, seed) / "sftmix" / "model"
        for arm in results
        for seed in arm.trials
    }
    return [
        (name, folder.relative_to(base).as_posix())
        for name, folder in folders.items()
        if folder.is_dir()
    ]


def _facts(results: Sequence[ArmResult], command: str) -> list[tuple[str, Any]]:
    trials = [trial for arm in results for trial in arm.trials.values()]
    found = {
        name: list(dict.fromkeys(str(each.facts[name]) for each in trials if name in each.facts))
        for name in FACTS
    }
    return [
        ("command", command),
        *((name, "; ".join(values)) for name, values in found.items() if values),
    ]


def _figures(results: Sequence[ArmResult], outcome: str) -> list[tuple[str, str]]:
    compared = [arm for arm in results if arm.differences[outcome] is not None]
    found = []
    if compared:
        better, unit = OUTCOMES[outcome]
        side = "left" if better < 0 else "right"
        found.append(
            (
                f"Difference to the control in {outcome.replace('_', ' ')} ({side} is better)",
                _difference_figure(compared, outcome, unit),
            )
        )
    if results:
        found.append(("Training loss: mean and range over the seeds", _curves(results)))
    return found


def _difference_figure(arms: Sequence[ArmResult], outcome: str, unit: str) -> str:
    figure, axes = plots.new_figure(0.8 + 0.45 * len(arms))
    for place, arm in enumerate(reversed(arms)):
        difference = arm.differences[outcome]
        assert difference is not None
        axes.plot(difference.per_seed, [place] * len(difference.per_seed), "o", ms=4, color=POINTS)
        if difference.low is not None and difference.high is not None:
            axes.plot([difference.low, difference.high], [place, place], "-", color="#2a7f62", lw=2)
        axes.plot([difference.mean], [place], "D", color="#2a7f62", ms=6)
    axes.axvline(0, color="#9a9a9a", linewidth=1)
    axes.set_yticks(range(len(arms)), [arm.name for arm in reversed(arms)])
    axes.set_xlabel(f"{unit}; a point per seed, the mean and its 95% interval")
    return plots.as_svg(figure)


def _curves(results: Sequence[ArmResult]) -> str:
    figure, axes = plots.new_figure(3.6)
    for arm in results:
        by_step: dict[int, list[float]] = {}
        for trial in arm.trials.values():
            for step, loss in trial.curve:
                by_step.setdefault(step, []).append(loss)
        steps = sorted(by_step)
        line = axes.plot(steps, [np.mean(by_step[step]) for step in steps], label=arm.name, lw=1.4)
        axes.fill_between(
            steps,
            [min(by_step[step]) for step in steps],
            [max(by_step[step]) for step in steps],
            color=line[0].get_color(),
            alpha=0.15,
            linewidth=0,
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats per response token")
    axes.legend(frameon=False)
    return plots.as_svg(figure)
