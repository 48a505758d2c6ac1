"""What the whole recipe costs beside plain supervised fine-tuning of the same model on the same
data.

    python benchmarks/recipe.py --data FILE.json [--hidden-size 256 --layers 4] [--rounds 3]
    [--out FILE.json]

Each round is one `sftmix run` per arm. It includes the NTP baseline, which is the plain run. The
seconds are those that the run prints for its stages. The ratio is reference run, scores, split and
SFTMix training over the baseline; preparing the data is needed for both.

    equal    the reference is the target's own architecture; scores are recorded while it trains
             (confidence.mode=online): no pass over the data after it
    weak     the same with a reference of half the width and half the layers
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch
from train import architecture, new_config, sftmix

from sftmix.engine.ranks import has_gpu

RECIPE = ("reference", "score", "split", "train")


def run_once(options: argparse.Namespace, arm: str, folder: Path) -> dict[str, float]:
    """Runs the recipe; returns the seconds of each stage."""
    share = 2 if arm == "weak" else 1
    small = architecture(options.hidden_size // share, options.layers // share)
    printed = sftmix(
        "run",
        new_config(options, folder),
        f"model.architecture={architecture(options.hidden_size, options.layers)}",
        f"reference.model.architecture={small}",
        f"tokenizer.train={{vocab_size: {options.vocab_size}}}",
        f"data.path={folder / 'data.json'}",
        "data.held_out_share=0",
        f"train.batch_size={options.batch_size}",
        f"train.epochs={options.epochs}",
        "confidence.mode=online",
        "log.every_steps=1000000",
        f"engine.zero_stage={options.zero_stage}",
        f"engine.num_processes={options.ranks}",
    )
    return {stage: float(seconds) for stage, seconds in re.findall(r"\] (\w+): (.+) s\n", printed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", required=True, help="Alpaca's JSON")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if has_gpu() else "cpu")
    record: dict[str, Any] = {**side_by_side.machine(device, "benchmarks/recipe.py"), "rounds": []}
    for number in range(options.rounds):
        found = {}
        for arm in ("equal", "weak") if number % 2 == 0 else ("weak", "equal"):
            with tempfile.TemporaryDirectory() as name:
                found[arm] = run_once(options, arm, Path(name))
            print(f"round {number + 1}: {arm}: {found[arm]}", flush=True)
        record["rounds"].append(found)
    record["ratios"] = {}
    for arm in ("equal", "weak"):
        ratios = [
            sum(found[arm][stage] for stage in RECIPE) / found[arm]["baseline"]
            for found in record["rounds"]
        ]
        record["ratios"][f"recipe ({arm}) / plain"] = ratios
        print(f"recipe ({arm}) / plain: median {np.median(ratios):.3f}, {sorted(ratios)}")
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
