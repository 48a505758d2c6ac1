"""Plans against what real steps on this machine do: memory, bytes sent, seconds.

    python benchmarks/planner.py [--ranks 1 2 4] [--cases CASE ...] [--out FILE.json]

For every case a step of rank 0 is traced without contents, and the same step is taken by real ranks
that are counted and timed. Memory: the most bytes alive in any phase. Sent: bytes of all
collectives. The traced step has micro-batches of 8,192 tokens, as in a plan, and is scaled to those
of the real one; with more than 2 ranks it is traced on 2 and scaled too. Seconds: rates of
`sftmix plan --calibrate` on small models, none of which is a case, in the same run.

A row beyond its target stays in the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import side_by_side
import torch

from sftmix.config.schema import Config
from sftmix.engine.counting import PHASES, Counted
from sftmix.planning import calibration
from sftmix.planning.plan import TRACED_TOKENS
from sftmix.planning.step import Load, Step
from sftmix.planning.timing import seconds_of
from sftmix.planning.traces import trace_step

SIZES = {
    "vocab_size": 3001,
    "hidden_size": 192,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, **SIZES},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, **SIZES},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 3001,
        "n_embd": 192,
        "n_layer": 4,
        "n_head": 6,
        "n_positions": 8192,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
# name -> family, engine, further model settings
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{f"{family}, ZeRO-3": (family, {"zero_stage": 3}, {}) for family in FAMILIES},
    **{f"llama, ZeRO-{stage}": ("llama", {"zero_stage": stage}, {}) for stage in (0, 1, 2)},
    "qwen3, ZeRO-3, checkpointing": (
        "qwen3",
        {"zero_stage": 3, "activation_checkpointing": True},
        {},
    ),
    "llama, ZeRO-3, padded": ("llama", {"zero_stage": 3, "packing": "off"}, {}),
    "llama, ZeRO-3, LoRA": ("llama", {"zero_stage": 3}, {"lora": {"rank": 8}}),
    "llama, ZeRO-1, LoRA": ("llama", {"zero_stage": 1}, {"lora": {"rank": 8}}),
}


def request_of(case: str, tokens: int, zero: Path) -> dict[str, Any]:
    """Returns what `measure_worker` measures."""
    family, engine, model = CASES[case]
    config = calibration.small_config("llama", 64, 1, stage=3)
    config["model"] = {"architecture": FAMILIES[family], **model}
    config["engine"] = {**config["engine"], **engine}
    if engine["zero_stage"] == 3:
        config["engine"]["deepspeed"] = str(zero)
    return {"config": config, "max_tokens": tokens}


def measured(
    requests: dict[str, Any], ranks: int
) -> tuple[calibration.Hardware, dict[str, dict[str, Any]]]:
    """Returns the rates of this machine, and what was measured of every case. Small models and
    cases take turns in one run, so that a slower minute falls on both."""
    with tempfile.TemporaryDirectory() as folder:
        small = calibration.requests_of(Path(folder))
        turns: list[tuple[str | None, Any]] = []
        for rate, case in itertools.zip_longest(small, requests):
            turns += [(None, rate)] if rate is not None else []
            turns += [(case, requests[case])] if case is not None else []
        steps = calibration.measured_steps(
            [request for _, request in turns],
            num_ranks=ranks,
            threads=calibration.threads_of(ranks),
        )
    pairs = list(zip((case for case, _ in turns), steps, strict=True))
    rates = calibration.fit([step for case, step in pairs if case is None], num_ranks=ranks)
    return rates, {case: step for case, step in pairs if case is not None}


def peak(counted: Counted) -> float:
    """Returns the most bytes alive in a step."""
    return max(p.total for phase, p in counted.peaks.items() if phase in PHASES)


def compare(case: str, request: Any, real: dict[str, Any], hardware: Any) -> dict[str, Any]:
    """Returns a row: predicted, measured, and their ratio."""
    config = Config.model_validate(request["config"])
    ranks = real["world_size"]
    trace = trace_step(config, world_size=min(2, ranks), max_tokens=TRACED_TOKENS)
    step = Step(trace, ranks, config.engine.zero_stage)
    length = real["tokens"] / real["documents"]
    load = Load(real["tokens"], real["responses"], real["documents"] * length**2)
    row: dict[str, Any] = {"case": case, "ranks": ranks, "tokens": real["tokens"]}
    for number, name in ((1, "one"), (2, "two")):
        counted = Counted.from_json(real[name])
        work = step.work(load, number)
        memory = max(sum(items.values()) for items in step.memory(load, number).values())
        seconds = seconds_of(work, hardware).expected
        row[name] = {
            "memory": [memory, peak(counted)],
            "sent": [
                sum(sum(part.sent.values()) for part in work.values()),
                sum(counted.sent.values()),
            ],
            "seconds": [seconds, statistics.median(real["seconds"][name])],
            "spread": [min(real["seconds"][name]), max(real["seconds"][name])],
        }
    return row


def ratios(rows: list[dict[str, Any]], kind: str) -> list[float]:
    """Returns predicted over measured of all rows."""
    pairs = [row[name][kind] for row in rows for name in ("one", "two")]
    return [predicted / measured for predicted, measured in pairs if measured]


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'case':<30} {'ranks':>5} {'memory':>8} {'sent':>8} {'seconds':>8}   (predicted/real)")
    for row in rows:
        cells = [
            f"{p / m:8.3f}" if m else f"{'-':>8}"
            for p, m in (row["two"][kind] for kind in ("memory", "sent", "seconds"))
        ]
        print(f"{row['case']:<30} {row['ranks']:>5} {' '.join(cells)}")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns of each kind the largest and the median error, and the share within the target."""
    found = {}
    for kind, target in (("memory", 0.05), ("sent", 0.01), ("seconds", 0.15)):
        errors = [abs(ratio - 1) for ratio in ratios(rows, kind)]
        found[kind] = {
            "target": target,
            "largest": max(errors),
            "median": statistics.median(errors),
            "within": sum(error <= target for error in errors),
            "of": len(errors),
        }
    return found


def sentences(contents: list[dict[str, Any]]) -> list[str]:
    """Returns the lines that every plan prints (`sftmix/planning/errors_measured.py`). contents: of
    the files that `--out` wrote."""
    found = summary([row for content in contents for row in content["rows"]])

    def share(kind: str) -> str:
        row = found[kind]
        return (
            f"{row['within']} of {row['of']} within {row['target']:.0%}, median"
            f" {row['median']:.1%}, largest {row['largest']:.1%}"
        )

    return [
        "error of plans, against real steps of small models on a CPU; ours on a GPU not measured:",
        f"  memory {share('memory')}",
        f"  bytes sent {share('sent')}",
        f"  seconds, with --calibrate, {share('seconds')}",
    ]


def table(contents: list[dict[str, Any]]) -> list[str]:
    """Returns the table of docs/planning.md: predicted over measured, of steps of two
    micro-batches."""
    lines = [
        "| case | ranks | memory | bytes sent | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in (row for content in contents for row in content["rows"]):
        cells = [
            f"{predicted / measured:.3f}" if measured else "-"
            for predicted, measured in (row["two"][kind] for kind in ("memory", "sent", "seconds"))
        ]
        lines.append(f"| {row['case']} | {row['ranks']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    zero = Path(__file__).with_name("planner_zero3.json")
    rows, rates = [], {}
    for ranks in options.ranks:
        requests = {case: request_of(case, options.tokens, zero) for case in options.cases}
        hardware, found = measured(requests, ranks)
        rates[ranks] = vars(hardware)
        for case, real in found.items():
            rows.append(compare(case, requests[case], real, hardware))
        show(rows)
        if options.out is not None:
            machine = side_by_side.machine(torch.device("cpu"), "benchmarks/planner.py")
            content = {**machine, "rates": rates, "summary": summary(rows), "rows": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
