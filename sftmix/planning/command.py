"""`sftmix plan`: what a run needs, before it starts."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sftmix.config.reader import load_config
from sftmix.config.schema import Config
from sftmix.errors import ConfigError, counted
from sftmix.evaluation.page import aligned, render
from sftmix.planning import figures
from sftmix.planning.calibration import calibrate
from sftmix.planning.errors_measured import ERRORS
from sftmix.planning.figures import GIB
from sftmix.planning.hardware import as_json, find
from sftmix.planning.plan import FREE_SHARE, Plan, make_plan
from sftmix.planning.remedies import remedies
from sftmix.planning.workload import Data, data_of
from sftmix.storage import provenance
from sftmix.storage.files import write_text

PER_NODE = 8  # GPUs, unless --nodes says otherwise


def plan_run(options: argparse.Namespace) -> int:
    """Prints the plan, or the sweep. Returns the exit code: 1 if the run does not fit."""
    if options.calibrate is not None:
        return _calibrate(options)
    if options.config is None:
        raise ConfigError("CONFIG is missing. Example: sftmix plan quickstart --gpus 8.")
    config = load_config(options.config, options.overrides)
    command = _command(options)
    counts = gpu_counts(options.sweep) if options.sweep else [options.gpus]
    data = data_of(config, examples=options.examples, tokens=options.tokens)
    plans = [_plan(config, options, data, count) for count in counts]
    fixes = [] if plans[0].fits or len(plans) > 1 else remedies(plans[0])
    content = {
        "command": command,
        "plans": [as_dict(plan, options.price) for plan in plans],
        "settings_that_fit": [asdict(fix) for fix in fixes],
        "error": ERRORS,
        "versions": provenance.versions(),
    }
    lines = (
        sweep_lines(plans, options.price) if len(plans) > 1 else plan_lines(plans[0], options.price)
    )
    if options.json:
        print(json.dumps(content, indent=1))
    else:
        print("\n".join([*lines, *_fix_lines(fixes), "", *ERRORS]))
    if options.to is not None:
        options.to.mkdir(parents=True, exist_ok=True)
        write_text(options.to / "plan.json", json.dumps(content, indent=1) + "\n")
        title, drawn = f"Plan of {options.config}", figures.of_plans(plans)
        write_page(options.to, title=title, lines=lines, drawn=drawn, command=command)
        if not options.json:
            print(f"page: {options.to / 'index.html'}")
    return 0 if any(plan.fits for plan in plans) else 1


def _command(options: argparse.Namespace) -> str:
    """Returns the command line that makes this plan."""
    words = ["sftmix", "plan", options.config, *options.overrides, "--gpu", options.gpu]
    words += ["--sweep", options.sweep] if options.sweep else ["--gpus", str(options.gpus)]
    for name in ("nodes", "interconnect", "price", "examples", "tokens"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", f"{value:g}"]
    return shlex.join(words)


def _plan(config: Config, options: argparse.Namespace, data: Data, num_gpus: int) -> Plan:
    per_node = PER_NODE if options.nodes is None or options.sweep else -(-num_gpus // options.nodes)
    hardware = find(options.gpu, interconnect=options.interconnect, gpus_per_node=per_node)
    return make_plan(config, hardware, num_ranks=num_gpus, data=data)


def _calibrate(options: argparse.Namespace) -> int:
    hardware, facts = calibrate(num_ranks=options.gpus)
    content = as_json(
        hardware,
        {
            **facts,
            "cpu": provenance.processor(),
            "versions": provenance.versions(),
            "ranks": options.gpus,
        },
    )
    write_text(options.calibrate, content)
    print(f"{hardware.name}, {hardware.source}: {options.calibrate}")
    print(f"use it: sftmix plan CONFIG --gpu {options.calibrate} --gpus {options.gpus}")
    return 0


def gpu_counts(text: str) -> list[int]:
    """Returns the numbers of `gpus=8,16,...,1024`: three dots stand for doublings. Raises
    ConfigError."""
    form = "expected gpus=8,16,...,1024"
    name, _, values = text.partition("=")
    parts = values.split(",")
    if name != "gpus" or not all(re.fullmatch(r"\d+|\.\.\.", part) for part in parts):
        raise ConfigError(f"--sweep {text}: {form}.")
    found: list[int] = []
    for number, part in enumerate(parts):
        if part != "...":
            found.append(int(part))
            continue
        if not found or number + 1 == len(parts) or parts[number + 1] == "...":
            raise ConfigError(f"--sweep {text}: numbers must stand around `...`; {form}.")
        while 0 < 2 * found[-1] < int(parts[number + 1]):
            found.append(2 * found[-1])
    if min(found) < 1 or found != sorted(set(found)):
        raise ConfigError(f"--sweep {text}: the numbers must rise from 1 on; {form}.")
    return found


def plan_lines(plan: Plan, price: float | None) -> list[str]:
    """Returns a plan as lines of text."""
    hardware, memory, work = plan.hardware, plan.memory, plan.work
    nodes = -(-plan.num_ranks // hardware.gpus_per_node)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{counted(plan.num_parameters, 'parameter')}, {plan.num_trained_parameters:,} trained;"
        f" {plan.num_ranks} x {hardware.name}, {counted(nodes, 'node')}",
        *textwrap.wrap(f"data: {plan.data.source}", 100),
        *textwrap.wrap(f"rates: {hardware.source}", 100),
        "",
        f"memory of a rank: {memory.total / GIB:.1f} GiB of {hardware.memory / GIB:.1f}, at its"
        f" peak in the {memory.peak_phase}: {verdict} (at most {FREE_SHARE:.0%} is planned)",
    ]
    rows = [[name, f"{size / GIB:.2f}"] for name, size in largest_first(memory.items)]
    if memory.offloaded:
        rows.append(["on the host instead, of this rank", f"{memory.offloaded / GIB:.2f}"])
    lines += [f"  {line}" for line in aligned(["", "GiB"], rows)]
    lines += [
        f"  states by formula: {plan.formula_bytes / GIB:.2f} GiB",
        f"host memory of a node: {plan.host_bytes / GIB:.1f} GiB; disk:"
        f" {plan.disk_bytes / 1e9:.0f} GB; start: about {plan.start_seconds:.0f} s to read the"
        " weights",
        "",
        f"a step: {work.real_tokens:,.0f} tokens; of a rank {work.num_micro_batches:.2g} times"
        f" forward and backward, at most {work.largest.tokens:,.0f} tokens each",
        f"sent in a step: {plan.bytes_within / 1e9:.1f} GB by a rank within its node,"
        f" {plan.bytes_between / 1e9:.1f} GB out of a node",
    ]
    titles = ["stage", "steps", "s/step", "tokens/s/GPU", "MFU", "hours"]
    titles += ["price"] if price is not None else []
    table = []
    for stage in plan.stages:
        low, middle, high = stage.hours
        mfu = "" if stage.mfu is None else f"{stage.mfu[2]:.0%}..{stage.mfu[0]:.0%}"
        row = [
            stage.name,
            f"{stage.num_steps:,.0f}",
            f"{stage.step.expected:.3g} [{stage.step.fast:.3g}, {stage.step.slow:.3g}]",
            f"{stage.tokens_per_second / plan.num_ranks:,.0f}",
            mfu,
            f"{middle:.2g} [{low:.2g}, {high:.2g}]",
        ]
        row += _price(plan, middle, price)
        table.append(row)
    low, middle, high = plan.hours
    total = ["all", "", "", "", "", f"{middle:.2g} [{low:.2g}, {high:.2g}]"]
    total += _price(plan, middle, price)
    lines += aligned(titles, [*table, total])
    seconds = plan.target.step
    lines.append(
        f"a step of the target: computing {seconds.computing:.3g} s, host {seconds.hosting:.3g} s,"
        f" sending {seconds.sending:.3g} s"
    )
    return [*lines, *(f"note: {reason}" for reason in plan.reasons)]


def _price(plan: Plan, hours: float, price: float | None) -> list[str]:
    """Returns the cell of the price of so many hours; none without one."""
    return [] if price is None else [f"{hours * plan.num_ranks * price:,.0f}"]


def largest_first(items: dict[str, float]) -> list[tuple[str, float]]:
    """Returns the items, the largest first."""
    return sorted(items.items(), key=lambda item: -item[1])


def sweep_lines(plans: list[Plan], price: float | None) -> list[str]:
    """Returns one line per plan."""
    titles = ["GPUs", "GiB", "fits", "s/step", "tokens/s/GPU", "MFU", "hours", "idle GPUs"]
    titles += ["price"] if price is not None else []
    rows = []
    for plan in plans:
        mfu = plan.target.mfu or (0.0, 0.0, 0.0)
        row = [
            str(plan.num_ranks),
            f"{plan.memory.total / GIB:.1f}",
            "yes" if plan.fits else "no",
            f"{plan.target.step.expected:.3g}",
            f"{plan.target.tokens_per_second / plan.num_ranks:,.0f}",
            f"{mfu[1]:.0%}",
            f"{plan.hours[1]:.2g} [{plan.hours[0]:.2g}, {plan.hours[2]:.2g}]",
            str(plan.work.idle_ranks),
        ]
        row += _price(plan, plan.hours[1], price)
        rows.append(row)
    first = plans[0]
    return [
        f"{counted(first.num_parameters, 'parameter')}; {first.hardware.name};"
        f" data: {first.data.source}",
        f"rates: {first.hardware.source}",
        *aligned(titles, rows),
    ]


def _fix_lines(fixes: list[Any]) -> list[str]:
    if not fixes:
        return []
    rows = [
        [fix.settings, f"{fix.memory / GIB:.1f}", f"{fix.seconds:.3g}", f"{fix.hours:.2g}"]
        for fix in fixes
    ]
    return [
        "",
        "what makes it fit, the fastest first:",
        *aligned(["settings", "GiB", "s/step", "hours"], rows),
    ]


def as_dict(plan: Plan, price: float | None) -> dict[str, Any]:
    """Returns a plan as JSON values: bytes, seconds, hours, US dollars."""
    return {
        "gpus": plan.num_ranks,
        "fits": plan.fits,
        "hardware": asdict(plan.hardware),
        "parameters": plan.num_parameters,
        "trained_parameters": plan.num_trained_parameters,
        "data": plan.data.source,
        "workload": asdict(plan.work),
        "memory": {
            "total": plan.memory.total,
            "peak_phase": plan.memory.peak_phase,
            "items": plan.memory.items,
            "offloaded": plan.memory.offloaded,
            "states_by_formula": plan.formula_bytes,
            "host_of_a_node": plan.host_bytes,
        },
        "bytes_within_node": plan.bytes_within,
        "bytes_between_nodes": plan.bytes_between,
        "disk_bytes": plan.disk_bytes,
        "start_seconds": plan.start_seconds,
        "stages": [
            {
                "name": stage.name,
                "steps": stage.num_steps,
                "seconds_per_step": asdict(stage.step),
                "tokens_per_second": stage.tokens_per_second,
                "mfu": stage.mfu,
                "hours": stage.hours,
            }
            for stage in plan.stages
        ],
        "hours": plan.hours,
        "price": None if price is None else [h * plan.num_ranks * price for h in plan.hours],
        "notes": plan.reasons,
    }


def write_page(
    folder: Path, *, title: str, lines: list[str], drawn: list[tuple[str, str]], command: str
) -> None:
    """Writes index.html. drawn: (caption, SVG) of its figures."""
    page = render(
        "sftmix.planning",
        "plan.html.j2",
        title=title,
        lines=lines,
        figures=drawn,
        errors=ERRORS,
        command=command,
    )
    write_text(folder / "index.html", page)
