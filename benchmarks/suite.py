"""All of sftmix's speed in one table: kernels, training, scoring, split, data, checkpoints, plans.

    python benchmarks/suite.py [--parts kernels train ...] [--out bench.json]      (make bench)

Runs the benchmarks of this folder one after another at sizes for the hardware found, at most 15
minutes on 2 cores, and collects their rows: median and spread (20th and 80th percentile; of fewer
than five values all of them). Nothing else may run meanwhile. `compare.py` compares two of its
files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import side_by_side
import torch

from sftmix.evaluation.page import aligned

HERE = Path(__file__).parent
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu th er in st ou ly".split()
NUM_WORDS = 5000  # of the generated text, used as often as Zipf's law says
PLANNED = "recipes/llama3.1-8b-alpaca"
# Arguments of each benchmark, by the hardware found.
SIZES: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "kernels": ["--shapes", "1024,512,32000", "--rounds", "6"],
        "step": ["--rounds", "10", "--hidden-size", "192"],
        "train": (
            "--examples 200 --vocab-size 2000 --rounds 3 --arms packed padded sftmix"
        ).split(),
        "scoring": ["--limit", "300", "--rounds", "4"],
        "split": ["--rows", "3000000", "--rounds", "3"],
        "checkpoint": ["--hidden-size", "512", "--rounds", "6"],
        "planner": ["--ranks", "1", "--cases", "llama, ZeRO-3", "llama, ZeRO-1"],
    },
    "cuda": {
        "kernels": ["--rounds", "6"],
        "step": "--rounds 10 --hidden-size 1024 --layers 8 --vocab-size 32000".split(),
        "train": (
            "--examples 4000 --hidden-size 1024 --layers 16 --batch-size 128 --max-length 2048"
            " --micro-batch-tokens 16384 --precision bf16 --zero-stage 3 --rounds 3 --arms packed"
            " padded sftmix"
        ).split(),
        "scoring": "--limit 4000 --hidden-size 1024 --layers 16 --rounds 4".split(),
        "split": ["--rows", "10000000", "--rounds", "3"],
        "checkpoint": ["--hidden-size", "2048", "--layers", "8", "--rounds", "6"],
        "planner": ["--ranks", "1", "--cases", "llama, ZeRO-3", "llama, ZeRO-1"],
    },
}
DATA_EXAMPLES, DATA_ROUNDS = 20_000, 3


@dataclass(frozen=True)
class Row:
    """low, high: the spread of its values. better: lower or higher; "" for what has no better."""

    part: str
    name: str
    unit: str
    value: float
    low: float
    high: float
    better: str = "lower"


def row_of(part: str, name: str, unit: str, values: Sequence[float], better: str = "lower") -> Row:
    """Returns the median and the spread of these values."""
    low, middle, high = min(values), statistics.median(values), max(values)
    if len(values) >= 5:
        low, middle, high = side_by_side.spread(values)
    return Row(part, name, unit, middle, low, high, better)


def kernel_rows(content: dict[str, Any]) -> list[Row]:
    return [
        Row("kernels", f"{row['provider']} {shape}", "ms", row["ms"], row["ms_20"], row["ms_80"])
        for shape, rows in content["results"].items()
        for row in rows
        if "ms" in row
    ]


def step_rows(content: dict[str, Any]) -> list[Row]:
    return [
        Row("step", name, "ms", row["ms"], row["ms_20"], row["ms_80"])
        for name, row in content["providers"].items()
        if isinstance(row, dict)  # else why it was not measured
    ]


def train_rows(content: dict[str, Any]) -> list[Row]:
    found = []
    for arm in content["rounds"][0]:
        for name, unit, better in (
            ("real tokens/s", "tokens/s", "higher"),
            ("peak GiB", "GiB", "lower"),
        ):
            values = [each[arm][name] for each in content["rounds"] if name in each[arm]]
            if not values:  # TRL's arm has no memory
                continue
            label = arm if unit == "tokens/s" else f"{arm}, peak memory"
            found.append(row_of("train", label, unit, values, better))
    for name, ratios in content["ratios"].items():
        found.append(row_of("train", name, "ratio", ratios, "higher"))
    return found


def timed_rows(part: str, content: dict[str, Any]) -> list[Row]:
    """Returns a row for everything that has `seconds` and its percentiles."""
    parts = {part: content} if "seconds" in content else content
    return [
        Row(part, name, "s", row["seconds"], row["seconds_20"], row["seconds_80"])
        for name, row in parts.items()
        if isinstance(row, dict) and "seconds_20" in row
    ]


def planner_rows(content: dict[str, Any]) -> list[Row]:
    """Returns the predicted over the measured values of the cases."""
    found = []
    for kind in ("memory", "sent", "seconds"):
        pairs = [row[name][kind] for row in content["rows"] for name in ("one", "two")]
        ratios = [predicted / measured for predicted, measured in pairs if measured]
        name = f"{kind}, predicted over measured"
        found.append(row_of("planner", name, "ratio", ratios or [1.0], ""))
    return found


READERS: dict[str, Callable[[dict[str, Any]], list[Row]]] = {
    "kernels": kernel_rows,
    "step": step_rows,
    "train": train_rows,
    "scoring": lambda content: timed_rows("scoring", content),
    "split": lambda content: timed_rows("split", content),
    "checkpoint": lambda content: timed_rows("checkpoint", content),
    "planner": planner_rows,
}
SCRIPTS = {"kernels": "loss_kernels"}  # where the file is not called as the part


def run(command: list[str], **environment: str) -> float:
    """Runs a command and returns its seconds. Raises RuntimeError with its last lines if it
    fails."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {(done.stdout + done.stderr)[-1500:]}")
    return time.perf_counter() - start


def sftmix(*arguments: str) -> list[str]:
    """Returns the command line of a subcommand."""
    return [sys.executable, "-m", "sftmix.cli", *arguments]


def write_rows(file: Path, count: int) -> None:
    """Writes Alpaca rows whose answers have a long tail of lengths, as real ones have."""
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(NUM_WORDS)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, NUM_WORDS + 1)))

    def text(length: float) -> str:
        return " ".join(draw.choices(words, cum_weights=weights, k=max(3, int(length))))

    rows = [
        {
            "instruction": text(draw.gauss(14, 4)),
            "input": "",
            "output": text(40 * 2 ** draw.gauss(0, 1)),
        }
        for _ in range(count)
    ]
    file.write_text(json.dumps(rows), encoding="utf-8")


def measure(part: str, sizes: dict[str, list[str]], folder: Path) -> list[Row]:
    """Runs one part and returns its rows."""
    if part == "data":
        return data_rows(folder)
    if part == "plan":
        return plan_rows(folder)
    script = HERE / f"{SCRIPTS.get(part, part)}.py"
    out = folder / f"{part}.json"
    given = list(sizes[part])
    if part == "train":
        write_rows(folder / "alpaca.json", int(given[given.index("--examples") + 1]))
        given += ["--data", str(folder / "alpaca.json")]
    if part == "split":
        given += ["--folder", str(folder / "split")]
    run([sys.executable, str(script), *given, "--out", str(out)])
    return READERS[part](json.loads(out.read_text(encoding="utf-8")))


def data_rows(folder: Path) -> list[Row]:
    """Times `sftmix data`: reading, templates, tokens, Arrow; with the start of the process."""
    write_rows(folder / "data.json", DATA_EXAMPLES)
    settings = [
        f"data.path={folder / 'data.json'}",
        f"run.dir={folder / 'data-run'}",
        "tokenizer.train={vocab_size: 2000}",
    ]
    config = folder / "data.yaml"
    config.write_text("run:\n  dir: unused\nmodel:\n  architecture: {model_type: llama}\n")
    seconds = [run(sftmix("data", str(config), *settings, "--force")) for _ in range(DATA_ROUNDS)]
    return [row_of("data", f"{DATA_EXAMPLES:,} examples prepared", "s", seconds)]


def plan_rows(folder: Path) -> list[Row]:
    """Times `sftmix plan` for a model that it has not seen, and again."""
    command = sftmix("plan", PLANNED, "--gpus", "8", "--gpu", "H100")
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    first = run(command, **cache)
    again = [run(command, **cache) for _ in range(3)]
    return [
        row_of("plan", f"{PLANNED}, the first time", "s", [first]),
        row_of("plan", f"{PLANNED}, again", "s", again),
    ]


ORDER = ("kernels", "step", "train", "scoring", "split", "data", "checkpoint", "plan", "planner")


def table_of(rows: Sequence[Row]) -> list[str]:
    """Returns the rows as lines of text."""
    cells = [
        [
            f"{row.part}: {row.name}",
            f"{row.value:.4g}",
            f"[{row.low:.4g}, {row.high:.4g}]",
            row.unit,
        ]
        for row in rows
    ]
    return aligned(["", "median", "spread", ""], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {**side_by_side.machine(device, "benchmarks/suite.py")}
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for part in options.parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="sftmix-bench-") as folder:
            try:
                found = measure(part, SIZES[device.type], Path(folder))
            except RuntimeError as error:  # the other parts still count
                failed[part] = str(error)
                print(f"{part} failed: {error}", flush=True)
                continue
        rows += found
        seconds[part] = time.perf_counter() - start
        print("\n".join([f"== {part}, {seconds[part]:.0f} s", *table_of(found)]), flush=True)
        content = {
            **record,
            "seconds": seconds,
            "failed": failed,
            "rows": [asdict(r) for r in rows],
        }
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(seconds.values()):.0f} s in all: {options.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
