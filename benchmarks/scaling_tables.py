"""The tables of docs/scaling.md, from a file of `scaling.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sftmix.planning.figures import GIB
from sftmix.planning.scaling_tables import MEASURED, Point, fewest_enough

Points = list[Point]


def tables(content: dict[str, Any]) -> dict[str, str]:
    """Returns name -> table of every part that the file has."""
    studies = {name: points_of(study) for name, study in content["studies"]["found"].items()}
    found = {name: make(studies[name]) for name, make in STUDY_TABLES.items()}
    found["adapters"] = adapters(studies["layouts"])
    parts = {"here": here_table, "published": published_table, "spot": spot_table}
    return found | {n: make(content[n]["found"]) for n, make in parts.items() if n in content}


def points_of(study: dict[str, Any]) -> Points:
    """Returns the points of a study in the file."""
    return [Point(**point) for point in study["points"]]


def pivot(
    points: Points,
    row: Callable[[Point], str],
    column: Callable[[Point], str],
    cell: Callable[[Points], str],
    corner: str,
) -> str:
    """Returns a table with a cell for all points that have its row and its column."""
    rows = list(dict.fromkeys(map(row, points)))
    columns = list(dict.fromkeys(map(column, points)))
    lines = [
        f"| {corner} | {' | '.join(columns)} |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in rows:
        own = [p for p in points if row(p) == name]
        cells = [cell([p for p in own if column(p) == each]) for each in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _network(point: Point) -> str:
    return f"{point.interconnect:g} Gb/s"


def _gpus(point: Point) -> str:
    return f"{point.gpus} GPUs"


def _model(point: Point) -> str:
    name: str = point.config
    return name.removeprefix("recipes/").rsplit("-", 1)[0]


def _only(points: Points) -> Point:
    (point,) = points
    return point


def networks(points: Points) -> str:
    def cell(found: Points) -> str:
        point = _only(found)
        return f"{point.rate:,.0f} ({point.efficiency:.0%})"

    return pivot(points, _network, _gpus, cell, "tokens/s per GPU")


def within_node(points: Points) -> str:
    def cell(found: Points) -> str:
        rates = {p.layout: p.rate for p in found}
        plain = rates.pop("ZeRO-3")
        return ", ".join(f"{name} {rate / plain:.2f}" for name, rate in rates.items())

    return pivot(points, _network, _gpus, cell, "rate over ZeRO-3's")


def batch(points: Points) -> str:
    def cell(found: Points) -> str:
        enough, most = fewest_enough(found)
        return f"{enough.tokens:,}" + (" or more" if enough is most else "")

    return pivot(points, _network, _gpus, cell, "tokens of a rank")


def recipe(points: Points) -> str:
    def cell(found: Points) -> str:
        point = _only(found)
        fits = "" if point.fits else ", does not fit"
        return f"{point.hours:.1f} h{fits}"

    return pivot(points, lambda p: p.layout, _gpus, cell, "all stages")


def layouts(points: Points) -> str:
    def cell(found: Points) -> str:
        fitting = [p for p in found if p.fits and "adapters" not in p.layout]
        if not fitting:
            return "none fits"
        best = max(fitting, key=lambda p: p.rate)
        return (
            f"{best.layout}, {best.tokens:,} tokens: {best.rate:,.0f}/s,"
            f" {best.memory / GIB:.0f} GiB"
        )

    return pivot(points, _model, _gpus, cell, "full weights")


def adapters(points: Points) -> str:
    def cell(found: Points) -> str:
        fitting = [p for p in found if p.fits]
        with_adapters, full = (
            max((p.rate for p in fitting if ("adapters" in p.layout) is lora), default=0)
            for lora in (True, False)
        )
        if not with_adapters:
            return "none fits"
        return f"{with_adapters:,.0f}/s" + (f" ({with_adapters / full:.2f} x)" if full else "")

    return pivot(points, _model, _gpus, cell, "adapters, over full weights")


STUDY_TABLES = {
    "networks": networks,
    "within_node": within_node,
    "batch": batch,
    "recipe": recipe,
    "layouts": layouts,
}


def here_table(found: dict[str, Any]) -> str:
    """Simulated and measured seconds of processes of one machine, and the rate of a process over
    that of one alone."""
    lines = [
        "| scaling | layout | processes | simulated (s) | measured (s) | ratio | rate of a process,"
        " simulated | measured |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for scaling in ("weak", "strong"):
        points = points_of(found[scaling])
        for real in (p for p in points if p.kind == MEASURED):
            same = ("layout", "gpus", "tokens")
            (other,) = (
                p
                for p in points
                if p is not real and all(getattr(p, name) == getattr(real, name) for name in same)
            )
            lines.append(
                f"| {scaling} | {real.layout} | {real.gpus} | {other.seconds:.2f}"
                f" | {real.seconds:.2f} [{real.fast:.2f}, {real.slow:.2f}]"
                f" | {other.seconds / real.seconds:.2f}"
                f" | {other.efficiency:.2f} | {real.efficiency:.2f} |"
            )
    return "\n".join(lines)


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rate of many GPUs over that of few."""
    lines = [
        "| source | model | GPUs | published | simulated |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for row in rows:
        few, many = row["gpus"]
        lines.append(
            f"| {row['source']} | {row['model']} | {few} to {many} | {row['published']:.2f}"
            f" | {row['simulated']:.2f} |"
        )
    return "\n".join(lines)


def spot_table(rows: Sequence[dict[str, Any]]) -> str:
    """What is scaled from 8 ranks over what is traced with all."""
    lines = ["| ranks | memory | bytes sent | calls |", "| ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['gpus']} | {row['memory']:.3f} | {row['sent']:.3f} | {row['calls']:.3f} |"
        )
    return "\n".join(lines)
