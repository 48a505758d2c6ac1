"""Collects the stages' results and renders the report. Everything that comes from data is
escaped."""

from __future__ import annotations

import base64
import json
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sftmix import __version__
from sftmix.config.reader import dump_config
from sftmix.errors import counted
from sftmix.evaluation import plots
from sftmix.evaluation.held_out import MODEL_NAMES, title_of
from sftmix.evaluation.page import aligned, markdown, render
from sftmix.evaluation.report_examples import (
    Agreement,
    RunOutputs,
    ScoredExamples,
    agreements,
    changes,
    duplicates,
    extremes,
    noise,
    read_scored_examples,
    truncated,
)
from sftmix.pairing.matching import pair_coverage
from sftmix.pairing.on_files import COVERAGE, COVERAGE_UNITS, open_matching
from sftmix.storage import artifacts, provenance
from sftmix.storage.failures import accessing
from sftmix.storage.files import read_record, write_text
from sftmix.train.log import HELD_OUT, MIXUP, NTP, read_metrics
from sftmix.train.meter import NAMES, minutes_of, tokens_of, watt_hours_of


def build_report(run: RunOutputs, folder: Path) -> None:
    """Writes index.html, report.md and the data map into `folder`; prints a summary and where they
    are."""
    metrics = read_json(run.inputs["evaluate"] / "metrics.json")
    table = result_table(run, metrics)
    scored = read_scored_examples(run)
    agreed = agreements(run, scored)
    costs, notes = cost_table(run), [UNITS, ONE_SEED, *choice_notes(run)]
    page = render(
        "sftmix.evaluation",
        "report.html.j2",
        title=run.config.run.dir.name,
        summary=summary(table),
        titles=TITLES,
        tables=measured_tables(run),
        table=[cells(row) for row in table],
        notes=notes,
        cost_titles=COST_TITLES,
        costs=costs,
        energy=ENERGY,
        groups=group_table(metrics),
        calibration_titles=CALIBRATION_TITLES,
        calibrations=calibration_table(metrics),
        calibration_note=CALIBRATION_NOTE,
        figures=[*_figures(run, scored), *_reliability(metrics), *_held_out_confidence(run)],
        data_map=_data_map(scored, folder),
        scale=scored.scale,
        num_not_finite=int((~np.isfinite(scored.confidence)).sum()),
        extremes=extremes(scored),
        changes=changes(run),
        duplicates=duplicates(scored),
        truncated=truncated(scored),
        noise=noise(scored),
        agreement_titles=Agreement.TITLES,
        agreements=[row.cells() for row in agreed],
        facts=_facts(run),
        models=_models(run),
        config=dump_config(run.config),
    )
    write_text(folder / "index.html", page)
    parts = [
        markdown(TITLES, [cells(row) for row in table]),
        "\n\n".join(notes) + "\n",
        markdown(COST_TITLES, costs),
        f"{ENERGY}\n",
        *_markdown_of_calibration(metrics),
        *_markdown_of_tables(run),
        *([markdown(Agreement.TITLES, [row.cells() for row in agreed])] if agreed else []),
    ]
    write_text(folder / "report.md", "\n".join(parts))
    for row in agreed:
        print(f"  {row.line()}")
    print_table(table, notes)


def result_table(run: RunOutputs, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per trained model: held-out figures, speed and time; None for a missing
    figure."""
    rows = []
    for stage in [name for name in MODEL_NAMES if name in run.inputs]:
        facts, held_out = run.facts_of(stage), metrics.get(stage, {})
        rows.append(
            {
                "model": MODEL_NAMES[stage],
                **{key: held_out.get(figure) for key, figure in HELD_OUT_FIGURES.items()},
                "tokens_per_second": facts["real_tokens_per_second"],
                "minutes": facts["waited_seconds"] / 60 if "waited_seconds" in facts else None,
                "is_trained": True,
            }
        )
    unknown = dict.fromkeys(("tokens_per_second", "minutes"))
    for name in metrics:
        if name not in MODEL_NAMES:
            figures = {key: metrics[name][figure] for key, figure in HELD_OUT_FIGURES.items()}
            rows.append({"model": title_of(name), **figures, **unknown, "is_trained": False})
    return rows


def summary(table: list[dict[str, Any]]) -> str:
    """Returns what the result table says, in a sentence."""
    found = [row for row in table if row["loss"] is not None and row["is_trained"]]
    if not found:
        return "There are no held-out examples, so nothing was compared."
    *others, last = found
    if not others:
        return f"{last['model']}: held-out loss {last['loss']:.4f} nats per response token."
    other, gap = others[0], last["loss"] - others[0]["loss"]
    return (
        f"{last['model']}'s held-out loss is {abs(gap):.4f} nats per response token"
        f" {'below' if gap < 0 else 'above'} that of the {other['model']}; exact match is"
        f" {100 * abs(last['exact_match'] - other['exact_match']):.1f} points"
        f" {'higher' if last['exact_match'] >= other['exact_match'] else 'lower'}. This is one"
        " seed."
    )


# key of a row -> in metrics.json
HELD_OUT_FIGURES = {
    "loss": "loss_nats_per_token",
    "perplexity": "perplexity",
    "exact_match": "exact_match",
}
COLUMNS = (
    ("model", "model", "{}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "ppl", "{:.3f}"),
    ("exact_match", "exact", "{:.1%}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("minutes", "minutes", "{:.2f}"),
)
TITLES = [title for _, title, _ in COLUMNS]
UNITS = (
    "loss: held-out, in nats per response token. ppl: perplexity, e to the loss. exact: exact"
    " match, the share of held-out responses that greedy decoding writes to the last token."
    " tokens/s: without padding, per second of training. minutes: what you waited for the stage."
)
# Measured on 2 cores of an AMD EPYC (README, Results).
ONE_SEED = (
    "One seed decides nothing: over six seeds of the quickstart study exact match has a standard"
    " deviation of 6.1 points (NTP) and 7.0 (SFTMix). A study compares several seeds."
)
HELD_OUT_TITLE = "Held-out loss during training (nats per response token)"
COST_TITLES = ["minutes", "waited", *NAMES.values(), "tokens", "Wh"]
ENERGY = (
    "tokens: trained on, without padding. Wh: energy of the GPUs while they trained, or of the"
    " machine's processors, whatever else they did; - where no counter can be read."
)
CALIBRATION_TITLES = [
    "model",
    "calibration error",
    "-loss: mean",
    "deviation",
    "-perplexity: mean",
    "deviation",
]
CALIBRATION_NOTE = (
    "Of held-out responses. Calibration error: mean distance between the probability of the token"
    " that greedy decoding would choose and how often such tokens are right, in 15 bins. -loss and"
    " -perplexity: confidence of an example under this model, and its standard deviation over the"
    " examples."
)
CONFIDENCE_TITLE = "Confidence of the held-out examples, by model"
RELIABILITY_TITLE = "Calibration: how often a predicted token is right"
# in a run folder, by `sftmix tasks` and `sftmix judge`
TABLES = {"Tasks": "*/results.json", "Ratings by a judge": "*/judged.json"}
WIDTH = 60  # columns of what is printed, for narrow terminals


def cost_table(run: RunOutputs) -> list[list[str]]:
    """Returns a row of text per training stage: minutes in total and by activity, tokens and
    energy."""
    rows = []
    for stage, name in {"reference": "reference", **MODEL_NAMES}.items():
        facts = run.facts_of(stage) if stage in run.inputs else {}
        if "waited_seconds" in facts:  # earlier versions did not record it
            minutes = minutes_of(facts)
            shown = [f"{minutes[each]:.2f}" for each in ("waited", *NAMES)]
            rows.append([name, *shown, tokens_of(facts), watt_hours_of(facts)])
    return rows


def choice_notes(run: RunOutputs) -> list[str]:
    """Returns which models held-out losses chose, and what that means for their figures."""
    train, found = run.config.train, []
    for stage, name in MODEL_NAMES.items():
        facts = run.facts_of(stage) if stage in run.inputs else {}
        if "best_step" in facts and train.chooses:
            kept = f"step {facts['best_step' if train.keep_best else 'num_steps']}"
            found.append(
                f"{name}: {kept} is kept, of {facts['num_steps']} taken and"
                f" {facts['num_planned_steps']} planned."
            )
    if found and train.keep_best:
        found.append(
            "The lowest held-out loss chose the models, on the examples of this table, so its"
            " losses are a little lower than those of other examples would be."
        )
    return [" ".join(found)] if found else []


def cells(row: dict[str, Any]) -> list[str]:
    """Returns a row of the result table as text."""
    return ["-" if row[key] is None else form.format(row[key]) for key, _, form in COLUMNS]


def print_table(table: list[dict[str, Any]], notes: Sequence[str] = (UNITS, ONE_SEED)) -> None:
    """Prints the result table, within 60 columns, and the notes that explain it."""
    rows = [cells(row) for row in table]
    rule = ["-" * max(map(len, column)) for column in zip(TITLES, *rows, strict=True)]
    print("\nSFTMix beside next-token prediction\n")
    print(*aligned(TITLES, [rule, *rows]), sep="\n")
    for note in notes:
        print(f"\n{textwrap.fill(note, WIDTH)}")
    print()


def group_table(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns exact match and loss by group: {"models": [...], "rows": [(group, [(loss, exact
    match), ...]), ...]}."""
    groups = sorted({group for figures in metrics.values() for group in figures["groups"]})
    rows = [
        (
            group,
            [
                (m["groups"][group]["loss_nats_per_token"], m["groups"][group]["exact_match"])
                for m in metrics.values()
            ],
        )
        for group in groups
    ]
    return {"models": [title_of(name) for name in metrics], "rows": rows}


def calibration_table(metrics: dict[str, Any]) -> list[list[str]]:
    """Returns a row of text per trained model that was measured by a version that counts it."""
    rows = []
    for stage, found in metrics.items():
        if "calibration" not in found:
            continue
        log, linear = (found["confidence"][kind] for kind in ("log", "linear"))
        rows.append(
            [
                title_of(stage),
                f"{found['calibration']['expected_error']:.1%}",
                f"{log['mean']:.3f}",
                f"{log['standard_deviation']:.3f}",
                f"{linear['mean']:.4g}",
                f"{linear['standard_deviation']:.4g}",
            ]
        )
    return rows


def measured_tables(run: RunOutputs) -> list[tuple[str, dict[str, Any]]]:
    """Returns the tables that `sftmix tasks` and `sftmix judge` left in the run folder, with their
    headings: {"titles", "rows", "note"}."""
    return [
        (title if path.parent.name == "tasks" else f"{title}: {path.parent.name}", found["table"])
        for title, pattern in TABLES.items()
        for path in sorted(run.config.run.dir.glob(pattern))
        if (found := read_record(path)) is not None and "table" in found
    ]


def _markdown_of_tables(run: RunOutputs) -> list[str]:
    return [
        f"{markdown(found['titles'], found['rows'])}\n{found['note']}\n"
        for _, found in measured_tables(run)
    ]


def _markdown_of_calibration(metrics: dict[str, Any]) -> list[str]:
    rows = calibration_table(metrics)
    return [markdown(CALIBRATION_TITLES, rows), f"{CALIBRATION_NOTE}\n"] if rows else []


def _reliability(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    bins = {
        title_of(stage): found["calibration"]["bins"]
        for stage, found in metrics.items()
        if "calibration" in found
    }
    return [(RELIABILITY_TITLE, plots.reliability_diagram(bins))] if bins else []


def _held_out_confidence(run: RunOutputs) -> list[tuple[str, str]]:
    path = run.inputs["evaluate"] / "per_example.parquet"
    if not path.is_file():  # without held-out examples there is none
        return []
    loss = pl.col("nll_sum") / pl.col("num_response_tokens")
    rows = pl.read_parquet(path).with_columns(loss=loss).filter(pl.col("loss").is_finite())
    losses = {
        str(name): found["loss"].to_numpy()
        for (name,), found in rows.group_by("model", maintain_order=True)
    }
    return [(CONFIDENCE_TITLE, plots.held_out_losses(losses))] if losses else []


def _figures(run: RunOutputs, scored: ScoredExamples) -> list[tuple[str, str]]:
    curves: dict[str, list[tuple[int, float | None]]] = {}
    held_out: dict[str, list[tuple[int, float | None]]] = {}
    for stage in ("reference", "baseline", "train"):
        if stage in run.inputs:
            name = MODEL_NAMES.get(stage, "reference")
            lines = read_metrics(run.inputs[stage] / "metrics.jsonl")
            curves[f"{name}: NTP"] = [(line["step"], line[NTP]) for line in lines]
            if lines and MIXUP in lines[0]:
                curves[f"{name}: Mixup"] = [(line["step"], line[MIXUP]) for line in lines]
            if measured := [(line["step"], line[HELD_OUT]) for line in lines if HELD_OUT in line]:
                held_out[name] = measured
    figures = [
        ("Training loss (nats per token; Mixup: per mixed position)", plots.loss_curves(curves)),
        *([(HELD_OUT_TITLE, plots.loss_curves(held_out))] if held_out else []),
        ("Confidence of the training examples", plots.confidence_histogram(scored)),
    ]
    mixup = run.config.mixup
    if mixup.weight > 0:
        matching = open_matching(run.inputs["split"], mixup, run.config.run.seed)
        drawn = matching.units(0, 0, min(COVERAGE_UNITS, matching.num_units))
        is_pair = drawn.units[:, 1] >= 0
        covered = pair_coverage(drawn.units[is_pair], scored.num_response_tokens)
        figures.append(
            ("Pairs of the first epoch", plots.pair_histograms(drawn.lam[is_pair], covered))
        )
    return figures


def _models(run: RunOutputs) -> list[tuple[str, str]]:
    """Returns the name and the folder of each model that is there, relative to the report's."""
    found = []
    for stage, name in {"reference": "reference", **MODEL_NAMES}.items():
        if stage in run.inputs and (run.inputs[stage] / "model").is_dir():
            found.append((name, f"../{run.inputs[stage].name}/model"))
    return found


def _data_map(scored: ScoredExamples, folder: Path) -> dict[str, Any] | None:
    """Writes data_map.png and returns it for the page; None if the scores have no variability."""
    points, num_left_out = plots.points_of_data_map(scored)
    if not len(points):
        return None
    image = plots.data_map(scored, points)
    with accessing(folder / "data_map.png"):
        (folder / "data_map.png").write_bytes(image)
    return {
        "image": base64.b64encode(image).decode(),
        "num_points": len(points),
        "num_examples": len(scored.example_ids),
        "num_left_out": num_left_out,
        "has_cuts": any(
            plots.cuts(values, scored.part) for values in (scored.shown, scored.variability)
        ),
    }


def _facts(run: RunOutputs) -> list[tuple[str, str]]:
    summary = read_json(run.inputs["data"] / "summary.json")
    split = run.facts_of("split")
    coverage = ", ".join(
        f"{share:.1%} {way} matching" for way, share in split["mix_coverage"].items()
    )
    target = run.facts_of("train")
    trained = target.get("num_trained_parameters", target["num_parameters"])
    size = counted(target["num_parameters"], "parameter") + (
        f", {trained:,} of them trained" if trained < target["num_parameters"] else ""
    )
    dropped = sum(summary["dropped"].values())
    return [
        (
            "examples",
            (
                f"{summary['num_read']:,} read, {summary['num_train']:,} trained on,"
                f" {summary['num_held_out']:,} held out"
            ),
        ),
        (
            "not used",
            (
                f"{dropped:,} dropped, {summary['num_left_out']:,} left out;"
                f" {summary['num_truncated']:,} truncated"
            ),
        ),
        ("split", ", ".join(f"{count:,} {part}" for part, count in split["sizes"].items())),
        (f"mix coverage ({COVERAGE})", coverage),
        (
            "target",
            (
                f"{size}, {counted(target['num_steps'], 'step')},"
                f" {counted(target['world_size'], 'process', 'processes')}"
            ),
        ),
        ("device", str(target.get("device", "unknown"))),
        ("precision", target["precision"]),
        ("trained on", artifacts.date_of(run.inputs["train"])),
        (
            "to make it again",
            (
                f"sftmix run {shlex.quote(str(run.config.run.dir))}; elsewhere: save the config"
                " below as run.yaml, and sftmix run run.yaml"
            ),
        ),
        ("made by", f"sftmix {__version__}, commit {provenance.commit() or 'unknown'}"),
        ("versions", provenance.as_text(provenance.versions())),
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file of a stage."""
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
