"""Simulated scaling beside what is known, and the studies of docs/scaling.md.

    python benchmarks/scaling.py [--parts here published spot studies] [--rates FILE.json]
    [--out FILE.json]

    here       weak and strong scaling of a small model over 1, 2 and 4 processes of this machine,
               measured and simulated; nothing else may run
    published  published tokens per second on few and on many GPUs
    spot       a step of a model cut to 4 layers in a traced world of many ranks, against the one
               that is scaled from 8
    studies    configs/scaling

Parts that are not run keep what the file has. Figures go to docs/figures.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import side_by_side
import torch
from planner_published import ROWS, Row, ratio, works_of

from sftmix.config.reader import load_config
from sftmix.config.shipped import CONFIGS
from sftmix.planning.hardware import SUSTAINED, Hardware
from sftmix.planning.plan import TRACED_TOKENS
from sftmix.planning.scaling import load_scale_study, points_of, rates_of
from sftmix.planning.scaling_tables import answers, figures_of
from sftmix.planning.step import Load, Step
from sftmix.planning.traces import trace_step, with_known_architecture

FIGURES = Path(__file__).parents[1] / "docs/figures"
STUDIES = ("networks", "within_node", "batch", "recipe", "layouts")
DRAWN = ("networks",)  # those of docs/scaling.md
STRONG = ["scale.scaling=strong", "scale.tokens=[4000]", "scale.micro_batch_tokens=1000"]
SPOT_WORLDS, SPOT_DEPTH = (64, 256, 1024), 4


def draw(name: str, points: Any, scaling: str) -> None:
    """Writes the figures of a study."""
    FIGURES.mkdir(exist_ok=True)
    drawn = figures_of(points, scaling)
    for number, (_, svg) in enumerate(drawn):
        end = f"_{number + 1}" if len(drawn) > 1 else ""
        (FIGURES / f"scaling_{name}{end}.svg").write_text(svg, encoding="utf-8")


def measured_here(known: Path | None) -> dict[str, Any]:
    """Returns measured and simulated points of processes of this machine. known: a file of
    planner.py with this machine's rates; else they are measured."""
    weak = load_scale_study("scaling/processes", [])
    rates = rates_of(weak) if known is None else _rates_in(known)
    found: dict[str, Any] = {"rates": {str(n): asdict(rate) for n, rate in rates.items()}}
    for name, overrides in (("weak", []), ("strong", STRONG)):
        study = load_scale_study("scaling/processes", overrides)
        points = points_of(study, rates)
        draw(f"here_{name}", points, name)
        found[name] = {
            "points": [asdict(point) for point in points],
            "answers": answers(points, study.length),
        }
        print("\n".join(found[name]["answers"]), flush=True)
    return found


def _rates_in(file: Path) -> dict[int, Hardware]:
    """Returns the rates by the number of ranks that planner.py has found."""
    found = json.loads(file.read_text(encoding="utf-8"))["rates"]
    return {int(ranks): Hardware(**rates) for ranks, rates in found.items()}


def published() -> list[dict[str, Any]]:
    """Returns, for published runs on few and on many GPUs, both rates of many over few."""
    found = []
    for few in ROWS:
        for many in ROWS:
            same = (many.source, many.recipe, many.gpu) == (few.source, few.recipe, few.gpu)
            if same and many.gpus > few.gpus:
                rates = [_predicted(row) for row in (few, many)]
                found.append(
                    {
                        "source": few.source,
                        "model": few.recipe,
                        "gpus": [few.gpus, many.gpus],
                        "published": many.published / few.published,
                        "simulated": rates[1] / rates[0],
                    }
                )
                print(found[-1], flush=True)
    return found


def _predicted(row: Row) -> float:
    return ratio(row, works_of(row), SUSTAINED) * row.published


def spot_checks() -> list[dict[str, Any]]:
    """Returns what a step scaled from 8 ranks is over one traced with all ranks."""
    config = load_config("recipes/llama3.1-8b-alpaca", [])
    config = config.model_copy(update={"model": with_known_architecture(config.model)})
    tokens = {"max_tokens": TRACED_TOKENS, "depth": SPOT_DEPTH}
    small = trace_step(config, world_size=8, **tokens)
    load = Load(small.tokens, small.responses, small.tokens**2 / 2)
    found = []
    for world in SPOT_WORLDS:
        scaled, whole = (
            Step(trace, world, 3)
            for trace in (small, trace_step(config, world_size=world, **tokens))
        )
        row: dict[str, Any] = {"gpus": world, "layers": SPOT_DEPTH}
        for name, of in (("memory", _memory), ("sent", _sent), ("calls", _calls)):
            row[name] = of(scaled, load) / of(whole, load)
        print(row, flush=True)
        found.append(row)
    return found


def _memory(step: Step, load: Load) -> float:
    return max(sum(items.values()) for items in step.memory(load, 2).values())


def _sent(step: Step, load: Load) -> float:
    return sum(sum(work.sent.values()) for work in step.work(load, 2).values())


def _calls(step: Step, load: Load) -> float:
    return sum(sum(work.calls.values()) for work in step.work(load, 2).values())


def studies() -> dict[str, Any]:
    """Returns the points and answers of the studies of the package."""
    assert {path.stem for path in CONFIGS.glob("scaling/*.yaml")} == {*STUDIES, "processes"}
    found = {}
    for name in STUDIES:
        study = load_scale_study(f"scaling/{name}", [])
        points = points_of(study)
        if name in DRAWN:
            draw(name, points, study.scaling)
        found[name] = {
            "points": [asdict(point) for point in points],
            "answers": answers(points, study.length),
        }
        print("\n".join([f"== {name}", *found[name]["answers"]]), flush=True)
    return found


PARTS = ("here", "published", "spot", "studies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rates", type=Path, help="here: a new file of planner.py on this machine")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    has_file = options.out is not None and options.out.is_file()
    content = json.loads(options.out.read_text()) if has_file else {}
    functions = {
        "here": lambda: measured_here(options.rates),
        "published": published,
        "spot": spot_checks,
        "studies": studies,
    }
    for part in options.parts:
        machine = side_by_side.machine(torch.device("cpu"), "benchmarks/scaling.py")
        content[part] = {"machine": machine, "found": functions[part]()}
        if options.out is not None:
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
