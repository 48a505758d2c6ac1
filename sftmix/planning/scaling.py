"""`sftmix scale STUDY.yaml`: how far a step goes over GPUs, models, layouts and networks.

A simulated point is the traced step of a plan (`step.py`), scaled to the number of GPUs, on stated
bandwidths (`timing.py`). Weak scaling gives every rank one full micro-batch; strong scaling divides
a fixed number of tokens, with at least a pair on a rank, so that further GPUs are idle; a run is
the whole recipe on its own data. With `gpu: here` the ranks are processes on this machine's CPU:
its rates are measured for every number of ranks, and so is every point, beside its simulation.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from sftmix.config.messages import explain
from sftmix.config.reader import apply_overrides, load_config, read_layers
from sftmix.config.schema import Config, Float, Int, Section
from sftmix.config.shipped import find_config
from sftmix.errors import ConfigError
from sftmix.planning.calibration import calibrate, measured_steps
from sftmix.planning.command import gpu_counts, write_page
from sftmix.planning.errors_measured import ERRORS
from sftmix.planning.hardware import Hardware, find
from sftmix.planning.plan import FREE_SHARE, make_plan, memory_of, offline, step_of
from sftmix.planning.scaling_tables import Point, Series, answers, figures_of, table_of
from sftmix.planning.step import Load
from sftmix.planning.timing import seconds_of
from sftmix.planning.workload import data_of
from sftmix.storage.files import write_text

SCALE = "scale"
HERE = "here"


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
    gpu: str = Field(
        "H100",
        description=(
            "GPU, or a file of `sftmix plan --calibrate`; here: processes on this machine's CPU,"
            " measured too."
        ),
    )
    gpus_per_node: Int = Field(8, ge=1, description="GPUs of a node.")
    interconnect: list[Float] = Field(
        default=[3200.0], min_length=1, description="Networks of a node, in Gb/s."
    )
    scaling: Literal["weak", "strong", "run"] = Field(
        "weak",
        description=(
            "weak: a full micro-batch per rank; strong: `tokens` over all ranks; run: all stages,"
            " on the config's data and batch size."
        ),
    )
    tokens: list[Int] = Field(
        default=[8192],
        min_length=1,
        description="Of a rank's micro-batch (weak), or of a step (strong); a series each.",
    )
    micro_batch_tokens: Int = Field(
        8192, ge=2, description="Strong scaling: most tokens of a micro-batch."
    )
    length: Int = Field(2048, ge=1, description="Tokens of an example; in a run the mean.")
    response_share: Float = Field(0.5, gt=0, le=1, description="Share of them that is trained.")

    @model_validator(mode="after")
    def _measures_pairs(self) -> ScaleStudy:
        if self.gpu != HERE:
            return self
        pair = 2 * self.length
        given = self.tokens if self.scaling == "weak" else [self.micro_batch_tokens]
        if self.scaling == "run" or any(tokens != pair for tokens in given):
            raise ValueError(
                f"gpu: here measures micro-batches of one pair: set `tokens` (weak) or"
                f" `micro_batch_tokens` (strong) to {pair}, twice `length`"
            )
        return self


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
    lines = [*table_of(points), "", *answers(points, study.length)]
    content = {
        "study": study.model_dump(mode="json"),
        "answers": answers(points, study.length),
        "points": [asdict(p) for p in points],
    }
    write_text(study.dir / "points.json", json.dumps(content, indent=1) + "\n")
    write_page(
        study.dir,
        title=f"Scaling of {options.config}",
        lines=lines,
        drawn=figures_of(points, study.scaling),
        command=shlex.join(["sftmix", "scale", options.config, *options.overrides]),
    )
    print("\n".join([*lines, "", *ERRORS, f"page: {study.dir / 'index.html'}"]))


def rates_of(study: ScaleStudy) -> dict[int, Hardware]:
    """Returns this machine's measured rates by the number of ranks; nothing for other GPUs."""
    if study.gpu != HERE:
        return {}
    return {ranks: calibrate(num_ranks=ranks)[0] for ranks in gpu_counts(f"gpus={study.gpus}")}


def points_of(study: ScaleStudy, here: dict[int, Hardware] | None = None) -> list[Point]:
    """Returns the points of a study, series by series. here: of `rates_of`."""
    counts = gpu_counts(f"gpus={study.gpus}")
    here = rates_of(study) if here is None else here
    found = []
    for name in study.configs:
        for layout, overrides in study.layouts.items():
            config = load_config(name, overrides)
            for tokens in study.tokens if study.scaling != "run" else [0]:
                for interconnect in study.interconnect:
                    series = Series(name, layout, tokens, interconnect)
                    kinds = [partial(_run, study, config, series)]
                    if study.scaling != "run":
                        kinds = [partial(_simulated, study, config, series, here)]
                    if here:
                        kinds.append(partial(_measured, study, config, series))
                    for kind in kinds:
                        found += list(_with_efficiency(map(kind, counts)))
    return found


def _with_efficiency(points: Iterator[Point]) -> Iterator[Point]:
    """Yields the points of a line, each with its rate over that of the first."""
    first: float | None = None
    for point in points:
        first = first or point.rate
        yield Point(**{**asdict(point), "efficiency": point.rate / first})


def _hardware(study: ScaleStudy, interconnect: float) -> Hardware:
    return find(study.gpu, interconnect=interconnect, gpus_per_node=study.gpus_per_node)


def _simulated(
    study: ScaleStudy, config: Config, series: Series, here: dict[int, Hardware], gpus: int
) -> Point:
    hardware = here.get(gpus) or _hardware(study, series.interconnect)
    step = step_of(config, gpus)
    busy, load, micro_batches = share_of(study, series.tokens, gpus)
    seconds = seconds_of(step.work(load, micro_batches), hardware)
    on_gpu = not hardware.is_synchronous
    memory = memory_of(config, step, load, micro_batches, on_gpu=on_gpu).total
    return Point(
        **vars(series),
        gpus=gpus,
        idle_gpus=gpus - busy,
        seconds=seconds.expected,
        fast=seconds.fast,
        slow=seconds.slow,
        rate=busy * load.tokens * micro_batches / seconds.expected / gpus,
        efficiency=1.0,
        memory=memory,
        fits=memory <= FREE_SHARE * hardware.memory,
        sending=seconds.sending,
        computing=seconds.computing,
        hosting=seconds.hosting,
    )


def _measured(study: ScaleStudy, config: Config, series: Series, ranks: int) -> Point:
    """Returns what as many processes of this machine take."""
    busy, load, micro_batches = share_of(study, series.tokens, ranks)
    request = {
        "config": offline(config).model_dump(mode="json") | {"tokenizer": {"path": "none"}},
        "max_tokens": round(load.tokens),
        "micro_batches": [micro_batches],
    }
    threads = max(1, (os.cpu_count() or 1) // ranks)
    (real,) = measured_steps([request], num_ranks=ranks, threads=threads)
    taken = real["seconds"][str(micro_batches)]
    seconds = statistics.median(taken)
    return Point(
        **vars(series),
        gpus=ranks,
        idle_gpus=ranks - busy,
        seconds=seconds,
        fast=min(taken),
        slow=max(taken),
        rate=busy * real["tokens"] * micro_batches / seconds / ranks,
        efficiency=1.0,
        memory=0.0,
        fits=True,
        sending=0.0,
        computing=0.0,
        hosting=0.0,
        kind="measured",
    )


def _run(study: ScaleStudy, config: Config, series: Series, gpus: int) -> Point:
    """Returns the plan of all stages."""
    data = data_of(config, examples=None, tokens=study.length)
    hardware = _hardware(study, series.interconnect)
    plan = make_plan(config, hardware, num_ranks=gpus, data=data)
    step = plan.target.step
    return Point(
        **vars(series),
        gpus=gpus,
        idle_gpus=plan.work.idle_ranks,
        seconds=step.expected,
        fast=step.fast,
        slow=step.slow,
        rate=plan.target.tokens_per_second / gpus,
        efficiency=1.0,
        memory=plan.memory.total,
        fits=plan.fits,
        sending=step.sending,
        computing=step.computing,
        hosting=step.hosting,
        hours=plan.hours[1],
    )


def share_of(study: ScaleStudy, tokens: int, gpus: int) -> tuple[int, Load, int]:
    """Returns how many GPUs have examples, the micro-batch of one of them, and how many
    micro-batches it has. tokens: of the series."""
    pair = 2 * study.length
    if study.scaling == "weak":
        busy, own, micro_batches = gpus, max(tokens, pair), 1
    else:
        pairs = max(1, tokens // pair)
        busy = min(gpus, pairs)
        whole = -(-pairs // busy) * pair
        micro_batches = -(-whole // max(study.micro_batch_tokens, pair))
        own = whole // micro_batches
    return busy, Load(own, study.response_share * own, own * study.length), micro_batches


def as_csv(points: Sequence[Point]) -> str:
    """Returns the points as CSV, with names in the first line."""
    text = io.StringIO()
    names = [field.name for field in fields(Point)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    return text.getvalue()
