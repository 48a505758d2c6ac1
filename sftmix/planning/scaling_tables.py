"""The points of a scaling study, as a table, as figures, and as answers in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.evaluation.page import aligned
from sftmix.evaluation.plots import as_svg, new_figure
from sftmix.planning.figures import GIB

SCALES = 0.8  # of the rate of the fewest GPUs: what counts as scaling
LINE, SIZES = 5, 3  # numbers of GPUs, and of tokens, from which a series says how far, how large
ENOUGH = 0.9  # of the rate of the largest micro-batch: what counts as enough tokens
MEASURED = "measured"
BANDS = 6  # lines up to which their ranges are drawn


@dataclass(frozen=True)
class Series:
    """What stays the same over a line of points. tokens: of a micro-batch (weak), of a step
    (strong), 0 of a run. interconnect: Gb/s."""

    config: str
    layout: str
    tokens: int
    interconnect: float


@dataclass(frozen=True)
class Point(Series):
    """seconds: of a step, with its range. rate: real tokens per second and GPU. efficiency: of the
    rate, over that of the fewest GPUs of the same kind. memory: bytes of a rank. hours: of all
    stages of a run, else 0. kind: simulated or measured."""

    gpus: int
    idle_gpus: int
    seconds: float
    fast: float
    slow: float
    rate: float
    efficiency: float
    memory: float
    fits: bool
    sending: float
    computing: float
    hosting: float
    hours: float = 0.0
    kind: str = "simulated"


def table_of(points: Sequence[Point]) -> list[str]:
    """Returns a line per point."""
    titles = ["config, layout", "tokens", "Gb/s", "GPUs", "idle", "s/step", "tokens/s/GPU"]
    rows = []
    for point in points:
        name = f"{point.config}, {point.layout}"
        row = [
            name + (", measured" if point.kind == MEASURED else ""),
            f"{point.tokens:,}" if point.tokens else "",
            f"{point.interconnect:g}",
            str(point.gpus),
            str(point.idle_gpus),
            f"{point.seconds:.3g} [{point.fast:.3g}, {point.slow:.3g}]",
            f"{point.rate:,.0f}",
            f"{point.efficiency:.0%}",
            f"{point.memory / GIB:.1f}" + ("" if point.fits else " (does not fit)"),
            f"{point.hours:.2g}" if point.hours else "",
        ]
        rows.append(row)
    head = "all points are simulated, except those that say measured"
    return [head, *aligned([*titles, "of the first", "GiB", "hours"], rows)]


def _groups(points: Iterable[Point], key: Callable[[Point], Any]) -> list[list[Point]]:
    """Returns the points with equal keys together, in the order of the first of each."""
    found: dict[Any, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    return list(found.values())


def answers(points: Sequence[Point], length: int) -> list[str]:
    """Returns what the points say, in words. length: tokens of an example."""
    simulated = [point for point in points if point.kind != MEASURED]
    return [
        *_how_far(simulated),
        *_which_layout(simulated),
        *_how_large(simulated, length),
        *_how_near(points),
    ]


def _how_far(points: Sequence[Point]) -> list[str]:
    """Returns up to how many GPUs each line scales."""
    lines = []
    for line in _groups(points, lambda p: (p.config, p.layout, p.tokens, p.interconnect)):
        if len(line) < LINE or line[0].hours:
            continue
        last = line[0]
        for point in line:
            if point.efficiency < SCALES:
                break
            last = point
        bound = max(("sending", "computing", "hosting"), key=lambda name: getattr(line[-1], name))
        lines.append(
            f"{_name(line[0])}: at least {SCALES:.0%} of the rate of {line[0].gpus} GPUs up to"
            f" {last.gpus}; {line[-1].efficiency:.0%} on {line[-1].gpus}, mostly {bound}"
        )
    return lines


def _which_layout(points: Sequence[Point]) -> list[str]:
    """Returns the fastest layout that fits, for each config, network and number of GPUs."""
    lines = []
    for group in _groups(points, lambda p: (p.config, p.interconnect, p.gpus)):
        if len({point.layout for point in group}) < 2:
            continue
        where = f"{group[0].config}, {group[0].interconnect:g} Gb/s, {group[0].gpus} GPUs"
        fitting = [point for point in group if point.fits]
        if not fitting:
            lines.append(f"{where}: no layout fits")
            continue
        best = max(fitting, key=lambda p: (-p.hours, p.rate))
        what = f"{best.hours:.2g} h" if best.hours else f"{best.rate:,.0f} tokens/s/GPU"
        tokens = f" with {best.tokens:,} tokens" if best.tokens else ""
        lines.append(
            f"{where}: {best.layout}{tokens}, {what}, {best.memory / GIB:.0f} GiB, is the fastest"
            " that fits"
        )
    return lines


def _how_large(points: Sequence[Point], length: int) -> list[str]:
    """Returns the fewest tokens of a micro-batch that are nearly as fast as the most."""
    lines = []
    for group in _groups(points, lambda p: (p.config, p.layout, p.interconnect, p.gpus)):
        if len({point.tokens for point in group}) < SIZES:
            continue
        enough, most = fewest_enough(group)
        examples = max(2, enough.tokens // length) * enough.gpus
        lines.append(
            f"{group[0].config}, {group[0].layout}, {group[0].interconnect:g} Gb/s,"
            f" {group[0].gpus} GPUs: {enough.tokens:,} tokens of a rank, {examples:,} examples of"
            f" a step, reach {ENOUGH:.0%} of the rate of {most.tokens:,} tokens"
        )
    return lines


def fewest_enough(points: Sequence[Point]) -> tuple[Point, Point]:
    """Returns the point with the fewest tokens that is nearly as fast as the one with the most, and
    that one."""
    most = max(points, key=lambda p: p.tokens)
    fast = [point for point in points if point.rate >= ENOUGH * most.rate]
    return min(fast, key=lambda p: p.tokens), most


def _how_near(points: Sequence[Point]) -> list[str]:
    """Returns simulated over measured seconds of the points that have both."""
    lines = []
    for group in _groups(points, lambda p: (p.config, p.layout, p.tokens, p.interconnect, p.gpus)):
        if len(group) == 2:
            simulated, measured = group
            lines.append(
                f"{_name(measured)}, {measured.gpus} ranks: simulated {simulated.seconds:.3g} s,"
                f" measured {measured.seconds:.3g} s, ratio"
                f" {simulated.seconds / measured.seconds:.2f}"
            )
    return lines


def _name(point: Point) -> str:
    tokens = f", {point.tokens:,} tokens" if point.tokens else ""
    return f"{point.config}, {point.layout}{tokens}, {point.interconnect:g} Gb/s"


def figures_of(points: Sequence[Point], scaling: str) -> list[tuple[str, str]]:
    """Returns (caption, SVG) per config: the rate over GPUs, or the hours of a run; a line per
    series. Simulated points are open and joined by dashes, measured ones filled."""
    from matplotlib import colormaps

    found = []
    for own in _groups(points, lambda p: p.config):
        figure, axes = new_figure(4.0)
        lines = _groups(own, lambda p: (p.layout, p.tokens, p.interconnect, p.kind))
        varies = {
            name: len({getattr(p, name) for p in own}) > 1
            for name in ("layout", "tokens", "interconnect")
        }
        colours: dict[Any, Any] = {}
        wide = colormaps["tab20"] if len(lines) > BANDS else None  # the usual cycle has ten colours
        for number, line in enumerate(lines):
            first = line[0]
            is_measured = first.kind == MEASURED
            series = (first.layout, first.tokens, first.interconnect)
            drawn = axes.plot(
                [point.gpus for point in line],
                [_height(point) for point in line],
                "s" if is_measured else "o--",
                markerfacecolor=None if is_measured else "none",
                color=colours.get(series) or (wide(number % 20) if wide else None),
                label=_label(first, varies),
            )[0]
            colours[series] = drawn.get_color()
            if not first.hours and len(lines) <= BANDS:
                axes.fill_between(
                    [point.gpus for point in line],
                    [point.rate * point.seconds / point.slow for point in line],
                    [point.rate * point.seconds / point.fast for point in line],
                    alpha=0.08,
                    color=drawn.get_color(),
                    linewidth=0,
                )
        counts = sorted({point.gpus for point in own})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("hours of all stages" if own[0].hours else "tokens/s per GPU")
        figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
        kinds = " and ".join(dict.fromkeys(point.kind for point in own))
        found.append((f"{own[0].config}, {scaling}, {kinds}", as_svg(figure)))
    return found


def _height(point: Point) -> float:
    return float(point.hours or point.rate)


def _label(point: Point, varies: dict[str, bool]) -> str:
    """Returns what tells a line from the others."""
    words = []
    if varies["layout"]:
        words.append(point.layout)
    if varies["tokens"]:
        words.append(f"{point.tokens:,} tokens")
    if varies["interconnect"]:
        words.append(f"{point.interconnect:g} Gb/s")
    return ", ".join([*words, *([MEASURED] if point.kind == MEASURED else [])]) or point.kind
