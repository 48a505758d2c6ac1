"""`sftmix scores show`, `merge` and `export`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import yaml

from sftmix.confidence.merge import merge_scores
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table import MAX_NAMED, ScoreTable, named, read_scores
from sftmix.confidence.table_files import CONFIDENCE, PERPLEXITY, refuse_existing
from sftmix.errors import counted
from sftmix.storage.artifacts import new_staging
from sftmix.storage.files import write_text
from sftmix.storage.hub import Target, deliver

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def run(options: argparse.Namespace) -> None:
    """Runs one command of `sftmix scores` with its parsed options, and prints what it returns.
    Raises SftmixError."""
    match options.scores_command:
        case "show":
            lines = show_scores(options.table, num=options.num, column=options.column)
        case "merge":
            lines = [
                f"{options.to}: " + line
                for line in merge_scores(options.tables, options.to).lines()
            ]
        case _:
            lines = [
                deliver(
                    lambda to: export_scores(options.table, to), Target.of(options), kind="dataset"
                )
            ]
    print("\n".join(lines))


def show_scores(source: str, *, num: int = 5, column: str | None = None) -> list[str]:
    """Returns lines that describe a table, with its `num` most and least confident examples."""
    table = read_scores(source, column=column)
    values, variability = table.values, table.confidence["variability"].to_numpy()
    ranks = table.confidence["rank"].to_numpy()
    lines = [
        f"{source}: {counted(len(values), 'example')}",
        *(describe(table.metadata) if table.metadata is not None else []),
    ]
    if table.metadata is None or table.column != "confidence":
        lines.append(
            f"the column {table.column!r} is taken for the confidence"
            + (", no sftmix metadata" if not table.metadata else "")
        )
    lines += ["", f"{'quantile':<14}" + "".join(f"{q:>12.0%}" for q in QUANTILES)]
    figures = {table.column: values}
    figures.setdefault("variability", variability)
    for name, column_values in figures.items():
        finite = column_values[np.isfinite(column_values)]
        found = (
            "".join(f"{value:>12.4g}" for value in np.quantile(finite, QUANTILES))
            if len(finite)
            else "  no finite value"
        )
        lines.append(f"{name:<14}{found}")
    # NaN (no rank) comes last
    rows = np.argsort(ranks)[: int(np.isfinite(ranks).sum())]
    for title, chosen in (
        ("most confident", rows[: max(0, num)]),
        ("least confident", rows[::-1][: max(0, num)]),
    ):
        lines += ["", f"{title}:", *(f"  {_id(table, row)}  {values[row]:.6g}" for row in chosen)]
    bad = np.flatnonzero(~np.isfinite(values))
    return [
        *lines,
        "",
        f"not finite: {len(bad):,}"
        + (f" ({named([_id(table, row) for row in bad[:MAX_NAMED]])})" if len(bad) else ""),
    ]


def describe(metadata: ScoreMetadata) -> list[str]:
    """Returns lines that describe how a table was made."""
    models = [
        (
            model.get("path")
            or f"random weights ({(model.get('architecture') or {}).get('model_type')})"
        )
        + (f" at {model['revision']}" if model.get("revision") else "")
        for model in metadata.models
    ]
    return [
        f"mode: {metadata.mode}",
        f"models: {', '.join(models)}",
        f"checkpoints: {', '.join(map(str, metadata.checkpoints))}",
        f"dataset: {', '.join(metadata.dataset)}",
        *(f"{key}: {value}" for key, value in metadata.fingerprints.items()),
        (
            "made by:"
            f" {', '.join(f'{name} {version}' for name, version in metadata.versions.items())};"
            f" commit {metadata.commit or 'unknown'}"
        ),
    ]


def export_scores(source: str, to: Path) -> Path:
    """Copies a table into a new folder with a dataset card, ready for the Hub. Returns `to`.

    Raises ArtifactError for an incomplete table, ConfigError if `to` exists.
    """
    refuse_existing(to)
    table = read_scores(source)
    assert table.metadata is not None, f"{source} was read without naming a column"
    files = ((table.path, CONFIDENCE), (table.perplexity_path, PERPLEXITY))
    text = dataset_card(
        table.metadata,
        num_examples=len(table.confidence),
        num_not_finite=int((~np.isfinite(table.values)).sum()),
    )
    staging = new_staging(to)
    for path, name in files:
        shutil.copyfile(path, staging / name)
    write_text(staging / "README.md", text)
    staging.rename(to)  # without a manifest, because the owner may edit the card
    return to


def dataset_card(metadata: ScoreMetadata, *, num_examples: int, num_not_finite: int) -> str:
    """Returns README.md of an exported table: metadata for the Hub, how it was made, how to use
    it."""
    configs = [
        {"config_name": "confidence", "data_files": CONFIDENCE, "default": True},
        {"config_name": "perplexity", "data_files": PERPLEXITY},
    ]
    front = yaml.safe_dump(
        {"pretty_name": "SFTMix confidence scores", "tags": ["sftmix"], "configs": configs},
        sort_keys=False,
    ).strip()
    made = "\n".join(f"- {line}" for line in describe(metadata))
    return f"""---
{front}
---

# SFTMix confidence scores

Confidence of {counted(num_examples, "instruction-response example")} under
{counted(len(metadata.checkpoints), "checkpoint")} ([SFTMix](https://arxiv.org/abs/2410.05248)):
minus the mean, over the checkpoints, of the perplexity of the response. Examples without a finite
confidence, and so without a rank: {num_not_finite:,}. No text is in here, only ids.

## Columns

- `{CONFIDENCE}`, one row per example: `example_id`, `confidence`, `variability` (standard deviation
  of the perplexity), `minimum`, `maximum` (of the perplexity), `rank` (1 is the most confident).
- `{PERPLEXITY}`, one row per checkpoint and example: `example_id`, `checkpoint`, `nll_sum` (nats
  over the response tokens), `num_response_tokens`, `perplexity`.

## How it was made

{made}

## How to use it

```python
from datasets import load_dataset

scores = load_dataset("OWNER/NAME", "confidence", split="train")  # or "perplexity"
```

In a run of sftmix over the same data, instead of training a reference model:
`sftmix run CONFIG confidence.scores=OWNER/NAME`. Whether it fits:
`sftmix scores check OWNER/NAME CONFIG`.
"""


def _id(table: ScoreTable, row: int) -> str:
    return str(table.example_ids[int(row)].as_py())
