"""The figures of a plan and of a scaling study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sftmix.evaluation.plots import as_svg, new_figure

if TYPE_CHECKING:
    from sftmix.planning.plan import Plan

GIB = 2**30


def of_plans(plans: list[Plan]) -> list[tuple[str, str]]:
    """Returns (caption, SVG) of each figure: memory, and over GPUs the speed."""
    found = [("Memory of a rank at the peak of a step", memory(plans))]
    if len(plans) > 1:
        found.append(("Tokens per second and GPU, with the range", speed(plans)))
    return found


def memory(plans: list[Plan]) -> str:
    """Returns the items of memory by number of GPUs, stacked, as SVG."""
    from matplotlib import colormaps

    figure, axes = new_figure(3.0 if len(plans) == 1 else 4.0)
    names = [str(plan.num_ranks) for plan in plans]
    left = [0.0] * len(plans)
    items = list(dict.fromkeys(name for plan in plans for name in plan.memory.items))
    items.sort(key=lambda name: -plans[0].memory.items.get(name, 0.0))
    colours = colormaps["tab20"]  # the usual cycle has ten
    for number, item in enumerate(items):
        sizes = [plan.memory.items.get(item, 0.0) / GIB for plan in plans]
        axes.barh(names, sizes, left=left, label=item, height=0.6, color=colours(number))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.axvline(plans[0].hardware.memory / GIB, color="#b5533c", linestyle="--", linewidth=1)
    axes.set_xlabel("GiB; dashed: the GPU's memory")
    axes.set_ylabel("GPUs")
    figure.legend(frameon=False, fontsize=7, ncols=3, loc="outside lower center")
    return as_svg(figure)


def speed(plans: list[Plan]) -> str:
    """Returns tokens per second and GPU over GPUs as SVG, with the range of each."""
    figure, axes = new_figure(3.6)
    gpus = [plan.num_ranks for plan in plans]

    def rates(name: str) -> list[float]:
        return [
            plan.work.real_tokens / getattr(plan.target.step, name) / plan.num_ranks
            for plan in plans
        ]

    axes.plot(gpus, rates("expected"), "o-", label="expected (simulated)")
    axes.fill_between(gpus, rates("slow"), rates("fast"), alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens/s per GPU")
    axes.legend(frameon=False)
    return as_svg(figure)
