"""The report's figures, without a date or random ids: the same run gives the same bytes."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.report.examples import ScoredExamples

COLOURS = {"confident": "#2a7f62", "middle": "#9a9a9a", "unconfident": "#b5533c"}
MAX_POINTS = 10_000  # of the data map; more only hide each other


def loss_curves(curves: dict[str, list[tuple[int, float | None]]]) -> str:
    """Returns the curves {name: [(step, loss), ...]} as SVG; a missing loss leaves a gap."""
    figure, axes = _figure(3.6)
    for name, points in curves.items():
        style = "--" if name.endswith("Mixup") else "-"
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, [np.nan if loss is None else loss for loss in losses], style, label=name, linewidth=1.4)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats")
    axes.legend(frameon=False)
    return _svg(figure)


def confidence_histogram(scored: ScoredExamples) -> str:
    """Returns the distribution of the finite confidences by part, as SVG; perplexities on a logarithmic axis."""
    figure, axes = _figure(3.6)
    finite = np.isfinite(scored.confidence)
    values, part = scored.shown[finite], scored.part[finite]
    if len(values):
        low, high = float(values.min()), float(values.max())
        if scored.is_perplexity:
            edges = np.geomspace(low, max(high, low * 1.01), 60)
            axes.set_xscale("log")
        else:
            edges = np.linspace(low, max(high, low + 0.01 * abs(low), low + 1e-9), 60)
        for name, colour in COLOURS.items():
            if (part == name).any():
                axes.hist(values[part == name], bins=edges, color=colour, label=name, alpha=0.85)
        axes.legend(frameon=False)
    axes.set_xlabel("mean perplexity of the response (confidence is its negative)" if scored.is_perplexity else "confidence")
    axes.set_ylabel("examples")
    return _svg(figure)


def points_of_data_map(scored: ScoredExamples) -> tuple[NDArray[np.int64], int]:
    """Returns the examples to draw, and how many cannot be drawn as they are not finite.

    More than MAX_POINTS are thinned evenly over the ranking by confidence, both ends of which are kept.
    """
    finite = np.flatnonzero(np.isfinite(scored.confidence) & np.isfinite(scored.variability))
    ranked = finite[np.argsort(scored.confidence[finite], kind="stable")]
    if len(ranked) > MAX_POINTS:
        ranked = ranked[np.linspace(0, len(ranked) - 1, MAX_POINTS).round().astype(np.int64)]
    return ranked, len(scored.confidence) - len(finite)


def boundaries(scored: ScoredExamples) -> list[float]:
    """Returns the confidences halfway between neighbouring parts, ascending."""
    values = [scored.confidence[(scored.part == name) & np.isfinite(scored.confidence)] for name in reversed(COLOURS)]
    values = [part for part in values if len(part)]
    return [float(below.max() / 2 + above.min() / 2) for below, above in itertools.pairwise(values)]


def data_map(scored: ScoredExamples, points: NDArray[np.int64]) -> bytes:
    """Returns a PNG of these examples: confidence (as mean perplexity, where it is one) against variability, coloured by the
    length of the response, with lines where the split cuts."""
    from matplotlib.colors import ListedColormap, LogNorm

    figure, axes = _figure(5)
    variability, lengths = scored.variability[points], scored.num_response_tokens[points]
    colours = ListedColormap(_map("viridis")(np.linspace(0, 0.93, 256)))  # without its end, which is pale on white
    norm = LogNorm(lengths.min(), max(lengths.max(), lengths.min() + 1))
    drawn = axes.scatter(variability, scored.shown[points], s=7, c=lengths, cmap=colours, norm=norm, alpha=0.7, linewidths=0)
    _scale_variability(axes, variability)
    if scored.is_perplexity:
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    bar = figure.colorbar(drawn, label="response tokens", pad=0.01)
    bar.solids.set_alpha(1)
    _plain_ticks(bar.ax.yaxis)
    sign = -1 if scored.is_perplexity else 1
    cuts = sorted(sign * cut for cut in boundaries(scored))
    for cut in cuts:
        axes.axhline(cut, color="black", linewidth=0.9, linestyle=(0, (6, 3)))
    if cuts:
        below, above = ("unconfident", "confident")[::sign]
        for text, cut, side, align in ((above, cuts[-1], 3, "bottom"), (below, cuts[0], -3, "top")):
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": align}
            axes.annotate(text, (0, cut), (5, side), **place, fontsize=9, bbox={"color": "white", "alpha": 0.7, "pad": 0.5})
    axes.set_xlabel("variability: standard deviation of the perplexity over the checkpoints" if scored.is_perplexity else "variability")
    axes.set_ylabel(f"{scored.scale} of the response")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _scale_variability(axes: Any, variability: NDArray[np.float64]) -> None:
    """Logarithmic; linear below a floor, so that zeros and mere rounding are on the map too."""
    floor = 1e-4 * variability.max()
    if floor <= 0:
        return
    if variability.min() >= floor:
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    else:
        axes.set_xscale("symlog", linthresh=variability[variability >= floor].min())


def _plain_ticks(axis: Any) -> None:
    """Labels a logarithmic axis 1, 2, 5, 10 in place of powers."""
    from matplotlib.ticker import FuncFormatter, LogFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _map(name: str) -> Any:
    from matplotlib import colormaps

    return colormaps[name]


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")  # without pyplot: no global state, no display
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "sftmix", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, dpi=120)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prologue, to stand inside HTML
