"""`sftmix scale STUDY.yaml`: how far a step goes over GPUs, models, layouts and networks.

Every point is simulated: the traced step of a plan (`step.py`), scaled to the number of GPUs, on
stated bandwidths (`timing.py`). Weak scaling gives every rank one full micro-batch; strong scaling
divides a fixed number of tokens, with at least a pair on a rank, so that further GPUs are idle.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from sftmix.config.messages import explain
from sftmix.config.reader import apply_overrides, load_config, read_layers
from sftmix.config.schema import Float, Int, Section
from sftmix.config.shipped import find_config
from sftmix.errors import ConfigError
from sftmix.evaluation.page import aligned
from sftmix.evaluation.plots import as_svg, new_figure
from sftmix.planning.command import gpu_counts, write_page
from sftmix.planning.errors_measured import ERRORS
from sftmix.planning.figures import GIB
from sftmix.planning.hardware import find
from sftmix.planning.plan import FREE_SHARE, memory_of, step_of
from sftmix.planning.step import Load
from sftmix.planning.timing import seconds_of
from sftmix.storage.files import write_text

SCALE = "scale"


class ScaleStudy(Section):
    """The section `scale`."""

    dir: Path = Field(description="Folder of the points, the table and the page.")
    configs: list[str] = Field(
        min_length=1, description="Configs whose step is scaled: files, or names of the package."
    )
    layouts: dict[str, list[str]] = Field(
        default={"as configured": []},
        description="Name and overrides of each variant of the configs.",
    )
    gpus: str = Field("8,16,...,1024", description="Numbers of GPUs; three dots: doublings.")
    gpu: str = Field("H100", description="GPU, or a file of `sftmix plan --calibrate`.")
    gpus_per_node: Int = Field(8, ge=1, description="GPUs of a node.")
    interconnect: list[Float] = Field(
        default=[3200.0], min_length=1, description="Networks of a node, in Gb/s."
    )
    scaling: Literal["weak", "strong"] = Field(
        "weak", description="weak: a full micro-batch per rank; strong: `tokens` over all ranks."
    )
    tokens: Int = Field(
        8192, ge=2, description="Of a rank's micro-batch (weak), or of a step (strong)."
    )
    length: Int = Field(2048, ge=1, description="Tokens of an example.")
    response_share: Float = Field(0.5, gt=0, le=1, description="Share of them that is trained.")


@dataclass(frozen=True)
class Point:
    """seconds: of a step, with its range. rate: real tokens per second and GPU. efficiency: of the
    rate, over that of the fewest GPUs. memory: bytes of a rank. kind: simulated or measured."""

    config: str
    layout: str
    interconnect: float
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
    kind: str = "simulated"


def load_scale_study(path: str, overrides: Sequence[str]) -> ScaleStudy:
    """Returns the section `scale` of a YAML file. Raises ConfigError."""
    file = find_config(path)
    raw, places = read_layers(file)
    apply_overrides(raw, places, overrides)
    if set(raw) != {SCALE}:
        raise ConfigError(
            f"{file}: expected one section, `scale`; found {sorted(raw)}. See docs/scaling.md."
        )
    try:
        return ScaleStudy.model_validate(raw[SCALE])
    except ValidationError as error:
        lines = [
            explain({**detail, "loc": (SCALE, *detail["loc"])}, file, places, {SCALE: ScaleStudy})
            for detail in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None


def scale(options: argparse.Namespace) -> None:
    """Writes points.csv, points.json and index.html, and prints the table."""
    study = load_scale_study(options.config, options.overrides)
    points = points_of(study)
    study.dir.mkdir(parents=True, exist_ok=True)
    write_text(study.dir / "points.csv", as_csv(points))
    content = {"study": study.model_dump(mode="json"), "points": [asdict(p) for p in points]}
    write_text(study.dir / "points.json", json.dumps(content, indent=1) + "\n")
    lines = table_of(points)
    write_page(
        study.dir,
        title=f"Scaling of {options.config}",
        lines=lines,
        drawn=figures_of(points, study.scaling),
        command=shlex.join(["sftmix", "scale", options.config, *options.overrides]),
    )
    print("\n".join([*lines, "", *ERRORS, f"page: {study.dir / 'index.html'}"]))


def points_of(study: ScaleStudy) -> list[Point]:
    """Returns the points of a study, series by series."""
    counts = gpu_counts(f"gpus={study.gpus}")
    found = []
    for name in study.configs:
        for layout, overrides in study.layouts.items():
            config = load_config(name, overrides)
            steps = {gpus: step_of(config, gpus) for gpus in counts}
            for interconnect in study.interconnect:
                hardware = find(
                    study.gpu, interconnect=interconnect, gpus_per_node=study.gpus_per_node
                )
                first: float | None = None
                for gpus in counts:
                    busy, load, micro_batches = share_of(study, gpus)
                    step = steps[gpus]
                    seconds = seconds_of(step.work(load, micro_batches), hardware)
                    memory = memory_of(
                        config,
                        step,
                        load,
                        micro_batches,
                        on_gpu=not hardware.is_synchronous,
                    ).total
                    rate = busy * load.tokens * micro_batches / seconds.expected / gpus
                    first = rate if first is None else first
                    found.append(
                        Point(
                            config=name,
                            layout=layout,
                            interconnect=interconnect,
                            gpus=gpus,
                            idle_gpus=gpus - busy,
                            seconds=seconds.expected,
                            fast=seconds.fast,
                            slow=seconds.slow,
                            rate=rate,
                            efficiency=rate / first,
                            memory=memory,
                            fits=memory <= FREE_SHARE * hardware.memory,
                            sending=seconds.sending,
                            computing=seconds.computing,
                            hosting=seconds.hosting,
                        )
                    )
    return found


def share_of(study: ScaleStudy, gpus: int) -> tuple[int, Load, int]:
    """Returns how many GPUs have examples, the micro-batch of one of them, and how many
    micro-batches it has."""
    pair = 2 * study.length
    if study.scaling == "weak":
        busy, tokens, micro_batches = gpus, max(study.tokens, pair), 1
    else:
        pairs = max(1, study.tokens // pair)
        busy = min(gpus, pairs)
        own = -(-pairs // busy) * pair
        micro_batches = max(1, -(-own // max(8192, pair)))
        tokens = own // micro_batches
    return busy, Load(tokens, study.response_share * tokens, tokens * study.length), micro_batches


def as_csv(points: Sequence[Point]) -> str:
    """Returns the points as CSV, with names in the first line."""
    text = io.StringIO()
    names = [field.name for field in fields(Point)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()


def table_of(points: Sequence[Point]) -> list[str]:
    """Returns a line per point."""
    titles = ["config, layout", "Gb/s", "GPUs", "idle", "s/step", "tokens/s/GPU", "of the first"]
    rows = [
        [
            f"{point.config}, {point.layout}",
            f"{point.interconnect:g}",
            str(point.gpus),
            str(point.idle_gpus),
            f"{point.seconds:.3g} [{point.fast:.3g}, {point.slow:.3g}]",
            f"{point.rate:,.0f}",
            f"{point.efficiency:.0%}",
            f"{point.memory / GIB:.1f}" + ("" if point.fits else " (does not fit)"),
        ]
        for point in points
    ]
    return ["all points are simulated", *aligned([*titles, "GiB"], rows)]


def figures_of(points: Sequence[Point], scaling: str) -> list[tuple[str, str]]:
    """Returns (caption, SVG) per config: the rate over GPUs, a line per layout and network."""
    found = []
    for config in dict.fromkeys(point.config for point in points):
        figure, axes = new_figure(4.0)
        own = [point for point in points if point.config == config]
        for key in dict.fromkeys((point.layout, point.interconnect) for point in own):
            line = [point for point in own if (point.layout, point.interconnect) == key]
            gpus = [point.gpus for point in line]
            drawn = axes.plot(
                gpus,
                [point.rate for point in line],
                "o--",
                markerfacecolor="none",
                label=f"{key[0]}, {key[1]:g} Gb/s",
            )[0]
            slow = [point.rate * point.seconds / point.slow for point in line]
            fast = [point.rate * point.seconds / point.fast for point in line]
            axes.fill_between(gpus, slow, fast, alpha=0.08, color=drawn.get_color(), linewidth=0)
        counts = sorted({point.gpus for point in own})
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("GPUs")
        axes.set_ylabel("tokens/s per GPU")
        axes.legend(frameon=False, fontsize=8)
        found.append((f"{config}, {scaling} scaling, simulated", as_svg(figure)))
    return found
