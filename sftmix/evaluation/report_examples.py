"""The report's sections on single training examples: extremes, copies, truncated ones, and
agreement between scorings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.batches.examples import TokenisedExamples
from sftmix.confidence.definition import agreement
from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table import as_floats, read_confidence
from sftmix.confidence.table_files import CONFIDENCE
from sftmix.config.schema import Config, SplitConfig
from sftmix.data.conversations import IMAGE
from sftmix.errors import counted
from sftmix.evaluation.held_out import MODEL_NAMES
from sftmix.pairing.matching import CONFIDENT, MIDDLE, UNCONFIDENT
from sftmix.pairing.on_files import RANDOM, SPLIT
from sftmix.pairing.split import split_values
from sftmix.storage.artifacts import read_facts

NUM_SHOWN = 10  # rows of a table of examples
NUM_CHANGED = 5  # examples that gain or lose most
MAX_CHARACTERS = 400  # of a message


@dataclass(frozen=True)
class RunOutputs:
    """The inputs of a report. inputs: the folder of every stage that has run, by name."""

    config: Config
    inputs: dict[str, Path]

    def facts_of(self, stage: str) -> dict[str, Any]:
        """Returns the facts in a stage's manifest."""
        return read_facts(self.inputs[stage])


@dataclass(frozen=True)
class ScoredExamples:
    """The training examples in the data's order, (N,) each. variability: NaN if unknown.

    is_perplexity: the confidence is a negative mean perplexity, and the report shows the
    perplexity; otherwise it is a column of the user's with any scale. table: rows with example_id,
    group and messages.
    """

    example_ids: pa.ChunkedArray
    confidence: NDArray[np.float64]
    variability: NDArray[np.float64]
    part: NDArray[np.str_]
    num_response_tokens: NDArray[np.int64]
    is_truncated: NDArray[np.bool_]
    is_perplexity: bool
    table: Any = None

    @property
    def scale(self) -> str:
        return "mean perplexity" if self.is_perplexity else "confidence"

    @property
    def shown(self) -> NDArray[np.float64]:
        return -self.confidence if self.is_perplexity else self.confidence


def read_scored_examples(run: RunOutputs) -> ScoredExamples:
    """Returns the run's examples with its confidences and its split. Only the columns above are
    held in memory."""
    examples = TokenisedExamples(run.inputs["data"] / "train.arrow")
    path = run.inputs["score"] / CONFIDENCE
    scores = pq.read_table(path, columns=["example_id", "confidence", "variability"])
    split = pq.read_table(run.inputs["split"] / SPLIT)
    for table in (scores, split):
        ids = table["example_id"].cast(pa.string())  # Polars writes large strings
        assert ids.equals(examples.example_ids), (
            f"a table of {path.parent.parent} is not in the order of the data"
        )
    return ScoredExamples(
        examples.example_ids,
        as_floats(scores["confidence"]),
        as_floats(scores["variability"]),
        np.asarray(split["part"].to_pylist()),
        examples.num_response_tokens,
        np.array(examples.table["is_truncated"], dtype=bool),
        ScoreMetadata.of_file(path) is not None,
        examples.table,
    )


def ranking(scored: ScoredExamples) -> NDArray[np.int64]:
    """Returns the examples with a finite confidence, most confident first; ties in the data's
    order."""
    finite = np.flatnonzero(np.isfinite(scored.confidence))
    return finite[np.argsort(-scored.confidence[finite], kind="stable")]


def extremes(scored: ScoredExamples) -> list[dict[str, Any]]:
    """Returns the most and the least confident examples: [{"title", "rows"}, ...]."""
    order = ranking(scored)
    chosen = {"Most confident": order[:NUM_SHOWN], "Least confident": order[::-1][:NUM_SHOWN]}
    return [
        {"title": title, "rows": [_row(scored, index) for index in places]}
        for title, places in chosen.items()
    ]


def changes(run: RunOutputs) -> list[dict[str, Any]]:
    """Returns the held-out examples whose loss SFTMix lowers and raises most, beside the baseline:
    [{"title", "rows"}, ...], nats per response token. Empty without a baseline."""
    path = run.inputs["evaluate"] / "per_example.parquet"
    if not path.is_file() or not {"baseline", "train"} <= set(run.inputs):
        return []
    table = pq.read_table(path, columns=["model", "nll_sum", "num_response_tokens"])
    before, after = (
        as_floats(rows["nll_sum"]) / as_floats(rows["num_response_tokens"])
        for name in ("baseline", "train")
        for rows in [table.filter(pc.equal(table["model"], MODEL_NAMES[name]))]
    )
    examples = TokenisedExamples(run.inputs["data"] / "held_out.arrow").table
    order = np.argsort(after - before, kind="stable")
    chosen = {"gained": order[:NUM_CHANGED], "lost": order[::-1][:NUM_CHANGED]}
    return [
        {
            "title": f"Held-out examples that {word} most from SFTMix",
            "rows": [
                {**_shown(examples[int(n)]), "before": before[n], "after": after[n]} for n in places
            ],
        }
        for word, places in chosen.items()
    ]


def duplicates(scored: ScoredExamples) -> dict[str, Any]:
    """Returns the groups of examples with equal content: their number, the number whose copies are
    in different parts, and the largest groups with the spread of confidence among the copies."""
    # Example.content_id: copies carry -2, -3, ... behind the hash of their content.
    contents = pc.replace_substring_regex(
        scored.example_ids.cast(pa.large_string()), pattern="-.*", replacement=""
    )
    counted = pc.value_counts(contents)
    repeated = counted.filter(pc.greater(counted.field("counts"), 1))
    group = pc.index_in(contents, value_set=repeated.field("values")).fill_null(-1).to_numpy()
    sizes = repeated.field("counts").to_numpy()
    parts_of_group = Counter(
        number
        for number, _ in {*zip(group.tolist(), scored.part.tolist(), strict=True)}
        if number >= 0
    )
    rows = []
    for number in np.argsort(-sizes, kind="stable")[:NUM_SHOWN]:
        members = np.flatnonzero(group == number)
        values = scored.shown[members]
        parts = Counter(scored.part[members].tolist())
        rows.append(
            {
                **_row(scored, members[0]),
                "example_id": repeated.field("values")[int(number)].as_py(),
                "num_copies": len(members),
                "lowest": float(values.min()),
                "highest": float(values.max()),
                "spread": float(values.max() - values.min()),
                "parts": ", ".join(
                    f"{parts[part]} {part}"
                    for part in (CONFIDENT, MIDDLE, UNCONFIDENT)
                    if parts[part]
                ),
            }
        )
    return {
        "num_groups": len(sizes),
        "num_examples": int(sizes.sum()),
        "num_apart": sum(count > 1 for count in parts_of_group.values()),
        "rows": rows,
    }


def truncated(scored: ScoredExamples) -> dict[str, Any]:
    """Returns how many examples are truncated, their share in each part, and the least confident
    ones."""
    parts = [
        {
            "part": part,
            "num_examples": len(inside),
            "num_truncated": int(inside.sum()),
            "share": float(inside.mean()),
        }
        for part in (CONFIDENT, MIDDLE, UNCONFIDENT)
        if len(inside := scored.is_truncated[scored.part == part])
    ]
    order = ranking(scored)[::-1]
    chosen = order[scored.is_truncated[order]][:NUM_SHOWN]
    return {
        "num_truncated": int(scored.is_truncated.sum()),
        "parts": parts,
        "rows": [_row(scored, index) for index in chosen],
    }


def noise(scored: ScoredExamples) -> dict[str, float] | None:
    """Returns, for generated data, how many of the wrong answers are in the unconfident part."""
    noisy = np.array(scored.table["is_noisy"], dtype=bool)
    if not noisy.any():
        return None
    return {
        "num_noisy": int(noisy.sum()),
        "share_unconfident": float((scored.part == UNCONFIDENT)[noisy].mean()),
    }


def _row(scored: ScoredExamples, index: np.int64) -> dict[str, Any]:
    return {**_shown(scored.table[int(index)]), "value": float(scored.shown[index])}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    texts = [
        (m["role"], m["content"].replace(IMAGE, "[image] ")) for m in json.loads(row["messages"])
    ]
    messages = [
        (role, text[:MAX_CHARACTERS] + (" ..." if len(text) > MAX_CHARACTERS else ""))
        for role, text in texts
    ]
    return {"example_id": row["example_id"], "group": row["group"] or "", "messages": messages}


@dataclass(frozen=True)
class Agreement:
    """Agreement of two scorings over `num_examples`; `num_left_out` lack a finite confidence in one
    or both."""

    modes: str
    spearman: float
    same_part: float
    num_examples: int
    num_left_out: int

    TITLES = (
        "scored by",
        "Spearman's rank correlation",
        "in the same part",
        "examples",
        "left out (not finite)",
    )

    def cells(self) -> list[str]:
        """Returns a row of the table as text; "-" for a missing figure."""
        figures = [
            form.format(value)
            for form, value in (("{:.4f}", self.spearman), ("{:.1%}", self.same_part))
        ]
        return [
            self.modes,
            *("-" if text.startswith("nan") else text for text in figures),
            f"{self.num_examples:,}",
            f"{self.num_left_out:,}",
        ]

    def line(self) -> str:
        """Returns what is printed."""
        modes, spearman, same_part, _, num_left_out = self.cells()
        shared = f"{same_part} of {counted(self.num_examples, 'example')} in the same part"
        return f"{modes}: Spearman {spearman}, {shared}, {num_left_out} left out (not finite)"


def agreements(run: RunOutputs, scored: ScoredExamples) -> list[Agreement]:
    """Returns the agreement of the run's scores with those of every compared mode, in the column
    that the split uses."""
    settings, split = run.config.confidence, run.config.split
    strata = scored.table.data.table[split.stratify_by] if split.stratify_by else None
    column = "confidence" if split.column == RANDOM else split.column
    own, *others = (
        read_confidence(run.inputs["score"] / folder / CONFIDENCE, scored.example_ids, column)
        for folder in ("", *(f"compared/{mode}" for mode in settings.compare))
    )
    return [
        agreement_of(
            scored.example_ids, own, other, split, f"{settings.mode}, {mode}", strata=strata
        )
        for mode, other in zip(settings.compare, others, strict=True)
    ]


def agreement_of(
    example_ids: pa.ChunkedArray,
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    split: SplitConfig,
    modes: str,
    *,
    strata: pa.ChunkedArray | None = None,
) -> Agreement:
    """Returns the agreement of two scorings of the same examples. Both are split as in the run,
    among the examples that are finite in both. strata: the column of `split.stratify_by`."""
    both = pa.array(np.flatnonzero(np.isfinite(a) & np.isfinite(b)))
    parts = [
        split_values(
            example_ids.take(both),
            values[both.to_numpy()],
            highest_first=split.highest_is_confident,
            confident_share=split.confident_share,
            unconfident_share=split.unconfident_share,
            strata=None if strata is None else strata.take(both),
        )
        for values in (a, b)
    ]
    figures = agreement(a[both.to_numpy()], b[both.to_numpy()], *parts)
    return Agreement(
        modes, figures["spearman"], figures["same_part"], len(both), len(a) - len(both)
    )
