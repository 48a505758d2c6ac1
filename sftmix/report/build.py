"""Gathers what the stages left, and renders it. Everything that comes from data is escaped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from sftmix import __version__, artifacts
from sftmix.config_file import dump_config
from sftmix.pipeline import StageContext
from sftmix.report import plots
from sftmix.runlog import MIXUP, NTP, read_metrics
from sftmix.stages import MODEL_NAMES, read_metrics_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_EXTREMES = 10


def build_report(context: StageContext) -> None:
    """Writes index.html and report.md into the stage's folder; prints the table and the report's final path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    table = result_table(context)
    environment = Environment(loader=PackageLoader("sftmix.report", "."), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(
        title=context.config.run.dir.name,
        titles=[title for _, title, _ in COLUMNS],
        table=[cells(row) for row in table],
        groups=group_table(context),
        figures=_figures(context),
        extremes=_extremes(context),
        noise=_noise(context),
        facts=_facts(context),
        config=dump_config(context.config),
    )
    artifacts.write_text(context.folder / "index.html", page)
    artifacts.write_text(context.folder / "report.md", markdown(table))
    print_table(table)
    print(f"  report: {context.config.run.dir / 'report' / 'index.html'}")


def result_table(context: StageContext) -> list[dict[str, Any]]:
    """Returns a row per trained model: held-out figures, speed and time; None where there is no figure."""
    metrics = read_metrics_json(context.inputs["evaluate"] / "metrics.json")
    rows = []
    for stage in ("baseline", "train"):
        if stage not in context.inputs:
            continue
        facts, held_out = context.facts_of(stage), metrics.get(stage, {})
        rows.append(
            {
                "model": MODEL_NAMES[stage],
                "loss": held_out.get("loss_nats_per_token"),
                "perplexity": held_out.get("perplexity"),
                "exact_match": held_out.get("exact_match"),
                "tokens_per_second": facts["real_tokens_per_second"],
                "minutes": facts["training_seconds"] / 60,
            }
        )
    return rows


COLUMNS = (
    ("model", "model", "{}"),
    ("loss", "held-out loss (nats/token)", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("exact_match", "exact match", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("minutes", "minutes", "{:.2f}"),
)


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the result table as text."""
    return ["-" if row[key] is None else form.format(row[key]) for key, _, form in COLUMNS]


def markdown(table: list[dict[str, Any]]) -> str:
    """Returns the result table in Markdown."""
    lines = [" | ".join(title for _, title, _ in COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cells(row)) for row in table]
    return "".join(f"| {line} |\n" for line in lines)


def print_table(table: list[dict[str, Any]]) -> None:
    """Prints the result table."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="SFTMix beside next-token prediction")
    for number, (_, title, _) in enumerate(COLUMNS):
        shown.add_column(title, justify="right" if number else "left")
    for row in table:
        shown.add_row(*cells(row))
    console = Console()
    Console(width=max(console.width, 100)).print(shown)


def group_table(context: StageContext) -> dict[str, Any]:
    """Returns exact match and loss by group: {"models": [...], "rows": [(group, [(loss, exact match), ...]), ...]}."""
    metrics = read_metrics_json(context.inputs["evaluate"] / "metrics.json")
    groups = sorted({group for figures in metrics.values() for group in figures["groups"]})
    rows = [
        (group, [(m["groups"][group]["loss_nats_per_token"], m["groups"][group]["exact_match"]) for m in metrics.values()])
        for group in groups
    ]
    return {"models": [MODEL_NAMES[name] for name in metrics], "rows": rows}


def _confidence(context: StageContext) -> dict[str, NDArray[Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(context.inputs["score"] / "confidence.parquet")
    parts = pq.read_table(context.inputs["split"] / "split.parquet", columns=["part"])
    columns = {name: table[name].to_numpy() for name in ("confidence", "variability")}
    return {**columns, "part": np.array(parts["part"].to_pylist())}


def _figures(context: StageContext) -> list[tuple[str, str]]:
    curves = {}
    for stage in ("reference", "baseline", "train"):
        if stage in context.inputs:
            name = MODEL_NAMES.get(stage, "reference")
            lines = read_metrics(context.inputs[stage] / "metrics.jsonl")
            curves[f"{name}: NTP"] = [(line["step"], line[NTP]) for line in lines]
            if lines and MIXUP in lines[0]:
                curves[f"{name}: Mixup"] = [(line["step"], line[MIXUP]) for line in lines]
    scores = _confidence(context)
    return [
        ("Training loss (nats per token; Mixup: per mixed position)", plots.loss_curves(curves)),
        ("Confidence of the training examples", plots.confidence_histogram(scores["confidence"], scores["part"])),
        ("Data map: mean and variability of the perplexity over the checkpoints", plots.data_map(**scores)),
    ]


def _train_rows(context: StageContext) -> Any:
    from sftmix.data.batches import TokenisedExamples

    return TokenisedExamples(context.inputs["data"] / "train.arrow").table


def _extremes(context: StageContext) -> list[dict[str, Any]]:
    confidence = _confidence(context)["confidence"]
    order = np.argsort(-confidence, kind="stable")
    table = _train_rows(context)
    sections = []
    for title, chosen in (("Most confident", order[:NUM_EXTREMES]), ("Least confident", order[::-1][:NUM_EXTREMES])):
        rows = []
        for index in chosen:
            row = table[int(index)]
            rows.append(
                {
                    "example_id": row["example_id"],
                    "perplexity": -float(confidence[index]),
                    "group": row["group"] or "",
                    "messages": [(m["role"], _shortened(m["content"])) for m in json.loads(row["messages"])],
                }
            )
        sections.append({"title": title, "rows": rows})
    return sections


def _shortened(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _noise(context: StageContext) -> dict[str, float] | None:
    """Returns, for generated data, how many of the wrong answers the split has put among the unconfident."""
    noisy = np.array(_train_rows(context)["is_noisy"], dtype=bool)
    if not noisy.any():
        return None
    unconfident = _confidence(context)["part"] == "unconfident"
    return {"num_noisy": int(noisy.sum()), "share_unconfident": float(unconfident[noisy].mean())}


def _facts(context: StageContext) -> list[tuple[str, str]]:
    summary = read_metrics_json(context.inputs["data"] / "summary.json")
    sizes = context.facts_of("split")["sizes"]
    target = context.facts_of("train")
    dropped = sum(summary["dropped"].values())
    versions = ", ".join(f"{name} {version}" for name, version in artifacts.versions().items())
    return [
        ("examples", f"{summary['num_read']:,} read, {summary['num_train']:,} trained on, {summary['num_held_out']:,} held out"),
        ("not used", f"{dropped:,} dropped, {summary['num_left_out']:,} left out; {summary['num_truncated']:,} truncated"),
        ("split", ", ".join(f"{count:,} {part}" for part, count in sizes.items())),
        ("target", f"{target['num_parameters']:,} parameters, {target['num_steps']:,} steps, {target['world_size']} processes"),
        ("made by", f"sftmix {__version__}, commit {artifacts.commit() or 'unknown'}"),
        ("versions", versions),
    ]
