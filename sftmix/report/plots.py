"""The report's figures, as SVG text without a date or random ids: the same run gives the same bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS = {"confident": "#2a7f62", "middle": "#9a9a9a", "unconfident": "#b5533c"}
MAX_POINTS = 4000  # of the data map; more make the page slow, not clearer


def loss_curves(curves: dict[str, list[tuple[int, float | None]]]) -> str:
    """Returns the curves {name: [(step, loss), ...]}; a missing loss leaves a gap."""
    figure, axes = _figure()
    for name, points in curves.items():
        style = "--" if name.endswith("Mixup") else "-"
        steps, losses = zip(*points, strict=True) if points else ((), ())
        axes.plot(steps, [np.nan if loss is None else loss for loss in losses], style, label=name, linewidth=1.4)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats")
    axes.legend(frameon=False)
    return _svg(figure)


def confidence_histogram(confidence: NDArray[np.float64], part: NDArray[Any]) -> str:
    """Returns the distribution of the mean perplexity (minus the confidence), by part, on a logarithmic axis."""
    figure, axes = _figure()
    perplexity = -confidence
    edges = np.geomspace(perplexity.min(), max(perplexity.max(), perplexity.min() * 1.01), 60)
    for name, colour in COLOURS.items():
        if (part == name).any():
            axes.hist(perplexity[part == name], bins=edges, color=colour, label=name, alpha=0.85)
    axes.set_xscale("log")
    axes.set_xlabel("mean perplexity of the response (confidence is its negative)")
    axes.set_ylabel("examples")
    axes.legend(frameon=False)
    return _svg(figure)


def data_map(confidence: NDArray[np.float64], variability: NDArray[np.float64], part: NDArray[Any]) -> str:
    """Returns variability against mean perplexity, a point per example, thinned evenly to MAX_POINTS."""
    figure, axes = _figure()
    chosen = np.unique(np.linspace(0, len(confidence) - 1, min(MAX_POINTS, len(confidence))).astype(int))
    for name, colour in COLOURS.items():
        points = chosen[part[chosen] == name]
        if len(points):
            axes.scatter(variability[points], -confidence[points], s=5, color=colour, label=name, alpha=0.5, linewidths=0)
    if (variability[chosen] > 0).all():
        axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("variability: standard deviation of the perplexity over the checkpoints")
    axes.set_ylabel("mean perplexity")
    axes.legend(frameon=False)
    for points in axes.collections:
        points.set_rasterized(True)  # one image instead of thousands of SVG nodes
    return _svg(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")  # without pyplot: no global state, no display
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
