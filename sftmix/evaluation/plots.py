"""The report's figures, without dates or random ids, so that the same run gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.evaluation.report_examples import ScoredExamples

COLOURS = {"confident": "#2a7f62", "middle": "#9a9a9a", "unconfident": "#b5533c"}
NO_METADATA = {"Date": None, "Creator": None}  # the same figure gives the same bytes
MAX_POINTS = 10_000  # of the data map; more would hide each other


def loss_curves(curves: dict[str, list[tuple[int, float | None]]]) -> str:
    """Returns the curves {name: [(step, loss), ...]} as SVG; a missing loss leaves a gap."""
    figure, axes = new_figure(3.6)
    for name, points in curves.items():
        style = "--" if name.endswith("Mixup") else "-"
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            steps,
            [np.nan if loss is None else loss for loss in losses],
            style,
            label=name,
            linewidth=1.4,
            marker="o" if len(points) == 1 else None,  # a single point has no line
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats")
    axes.legend(frameon=False)
    return as_svg(figure)


def reliability_diagram(models: Mapping[str, Sequence[tuple[float, float, int]]]) -> str:
    """Returns the accuracy of predicted tokens over their probability as SVG. models: name ->
    (probability, accuracy, tokens) of its bins; the area of a point is its share of the tokens."""
    figure, axes = new_figure(3.6)
    axes.plot([0, 1], [0, 1], ":", color=COLOURS["middle"], linewidth=1)
    for name, bins in models.items():
        probability, accuracy, tokens = (np.array(column) for column in zip(*bins, strict=True))
        line = axes.plot(probability, accuracy, "-", label=name, linewidth=1.4)[0]
        area = 400 * tokens / tokens.sum()
        axes.scatter(probability, accuracy, area, color=line.get_color(), alpha=0.5)
    axes.set_xlabel("probability of the likeliest token")
    axes.set_ylabel("share that is right")
    axes.legend(frameon=False)
    return as_svg(figure)


def held_out_losses(models: Mapping[str, NDArray[np.float64]]) -> str:
    """Returns the distribution of the examples' losses by model as SVG, on common bins. models:
    name -> (N,) losses, finite."""
    figure, axes = new_figure(3.6)
    everything = np.concatenate(list(models.values()))
    edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-9), 30)
    for name, losses in models.items():
        axes.hist(losses, bins=edges, histtype="step", linewidth=1.4, label=name)
    axes.set_xlabel("loss of the response in nats per token (confidence is its negative)")
    axes.set_ylabel("examples")
    axes.legend(frameon=False)
    return as_svg(figure)


def confidence_histogram(scored: ScoredExamples) -> str:
    """Returns the distribution of the finite confidences by part, as SVG; perplexities on a
    logarithmic axis."""
    figure, axes = new_figure(3.6)
    finite = np.isfinite(scored.confidence)
    values, part = scored.shown[finite], scored.part[finite]
    if len(values):
        low, high = float(values.min()), float(values.max())
        if scored.is_perplexity:
            edges = np.geomspace(low, max(high, low * 1.01), 60)
            axes.set_xscale("log")
            _plain_ticks(axes.xaxis)
        else:
            edges = np.linspace(low, max(high, low + 0.01 * abs(low), low + 1e-9), 60)
        for name, colour in COLOURS.items():
            if (part == name).any():
                axes.hist(values[part == name], bins=edges, color=colour, label=name, alpha=0.85)
        axes.legend(frameon=False)
    axes.set_xlabel(
        "mean perplexity of the response (confidence is its negative)"
        if scored.is_perplexity
        else "confidence"
    )
    axes.set_ylabel("examples")
    return as_svg(figure)


def pair_histograms(lam: NDArray[np.float64], covered: NDArray[np.float64]) -> str:
    """Returns the distributions of lam and of the mixed share of a pair's response tokens, as SVG
    side by side. lam, covered: one value per pair, in [0, 1]."""
    figure, both = new_figure(2.8, columns=2)
    names = ("lam: share of the confident example", "share of a pair's response tokens mixed")
    for axes, values, name in zip(both, (lam, covered), names, strict=True):
        axes.hist(values, bins=np.linspace(0, 1, 41), color=COLOURS["confident"], alpha=0.85)
        axes.set_xlabel(name)
    both[0].set_ylabel("pairs")
    return as_svg(figure)


def points_of_data_map(scored: ScoredExamples) -> tuple[NDArray[np.int64], int]:
    """Returns the examples to draw, and the number of those that are not finite and cannot be
    drawn.

    More than MAX_POINTS are thinned evenly over the ranking by confidence; both ends are kept.
    """
    finite = np.flatnonzero(np.isfinite(scored.confidence) & np.isfinite(scored.variability))
    ranked = finite[np.argsort(scored.confidence[finite], kind="stable")]
    if len(ranked) > MAX_POINTS:
        ranked = ranked[np.linspace(0, len(ranked) - 1, MAX_POINTS).round().astype(np.int64)]
    return ranked, len(scored.confidence) - len(finite)


def cuts(values: NDArray[np.float64], part: NDArray[np.str_]) -> list[tuple[float, str, str]]:
    """Returns where the split cuts along these values, ascending: (halfway between two parts, the
    part below, the part above). Nothing if the parts overlap, because the split uses another column
    or strata."""
    inside = {name: values[(part == name) & np.isfinite(values)] for name in COLOURS}
    spans = sorted((found.min(), found.max(), name) for name, found in inside.items() if len(found))
    if any(above[0] < below[1] for below, above in pairwise(spans)):
        return []
    return [
        (float(below[1] / 2 + above[0] / 2), below[2], above[2]) for below, above in pairwise(spans)
    ]


def data_map(scored: ScoredExamples, points: NDArray[np.int64]) -> bytes:
    """Returns a PNG of these examples: confidence (as mean perplexity if it is one) against
    variability, coloured by the length of the response, with lines at the cuts of the split."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    figure, axes = new_figure(5)
    variability, lengths = scored.variability[points], scored.num_response_tokens[points]
    # without its end, which is hard to see on white
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.93, 256)))
    norm = LogNorm(lengths.min(), max(lengths.max(), 2 * lengths.min()))
    size = np.clip(20_000 / len(points), 3, 9)
    drawn = axes.scatter(
        variability,
        scored.shown[points],
        size,
        lengths,
        cmap=colours,
        norm=norm,
        alpha=0.7,
        linewidths=0,
    )
    _scale_variability(axes, variability)
    if scored.is_perplexity:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    bar = figure.colorbar(drawn, label="response tokens", pad=0.01)
    bar.solids.set_alpha(1)
    _plain_ticks(bar.ax.yaxis)
    by_shown, by_variability = (
        cuts(scored.shown, scored.part),
        cuts(scored.variability, scored.part),
    )
    _draw_cuts(axes, by_shown or by_variability, is_across=bool(by_shown))
    axes.set_xlabel(
        "variability: standard deviation of the perplexity over the checkpoints"
        if scored.is_perplexity
        else "variability"
    )
    axes.set_ylabel(f"{scored.scale} of the response")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _draw_cuts(axes: Any, found: list[tuple[float, str, str]], *, is_across: bool) -> None:
    """Draws a line at each cut, and names the outer parts at its end."""
    for value, _, _ in found:
        (axes.axhline if is_across else axes.axvline)(
            value, color="black", linewidth=0.9, linestyle=(0, (6, 3))
        )
    outer = ((found[0][0], found[0][1], -3), (found[-1][0], found[-1][2], 3)) if found else ()
    order = 1 if is_across else -1  # of the two coordinates
    for value, name, offset in outer:
        axes.annotate(
            name,
            xy=(1, value)[::order],
            xycoords=("axes fraction", "data")[::order],
            xytext=(-5, offset)[::order],
            ha="right" if is_across or offset < 0 else "left",
            va="top" if not is_across or offset < 0 else "bottom",
            textcoords="offset points",
            fontsize=9,
            bbox={"color": "white", "alpha": 0.6, "pad": 0.5},
        )


def _scale_variability(axes: Any, variability: NDArray[np.float64]) -> None:
    """Logarithmic; linear below a floor, so that zeros and rounding errors are on the map too."""
    floor = 1e-4 * variability.max()
    if floor <= 0:
        return
    if variability.min() >= floor:
        axes.set_xscale("log")
    else:
        smallest = variability[variability >= floor].min()
        axes.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(smallest)))
    _plain_ticks(axes.xaxis)


def _plain_ticks(axis: Any) -> None:
    """Labels a logarithmic axis 1, 2, 5, 10 instead of powers."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def new_figure(height: float, *, columns: int = 1) -> tuple[Any, Any]:
    """Returns a figure of a page's width and its axes, an array of them for several columns.
    height: inches."""
    from matplotlib.figure import Figure

    # without pyplot: no global state, no display
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(ncols=columns)
    for each in np.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Any) -> str:
    """Returns a figure as SVG for use inside HTML. What is black takes the colour of the page's
    text, so that dark pages show it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sftmix", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=NO_METADATA, dpi=120, transparent=True)
    text = buffer.getvalue().replace("#000000", "currentColor")
    return text[text.index("<svg") :]  # without the XML prologue, for use inside HTML
