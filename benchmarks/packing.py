"""The useful share of the ranks' time, packed and padded: the table of docs/packing.md.

    python benchmarks/packing.py --data alpaca_data.json [--out FILE.json]

Prepares all of Alpaca-52K with a tokenizer of 4,000 pieces, pairs it at random, and cuts the first
400 steps for every batch size and number of ranks. Computed, not timed: attention is not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
import torch

from sftmix.batches.balance import expected_useful_share
from sftmix.batches.examples import TokenisedExamples
from sftmix.config.reader import load_config
from sftmix.data.prepare import prepare
from sftmix.pairing.matching import Matching

BATCHES = ((32, 1), (32, 8), (32, 16), (64, 8), (64, 16), (128, 8), (128, 16))
STEPS, MICRO_BATCH_TOKENS = 400, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="Alpaca's JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("alpaca-small", [f"data.path={options.data}", "data.held_out_share=0"])
        prepare(config, Path(folder))
        num_tokens = TokenisedExamples(Path(folder) / "train.arrow").num_tokens
    order = np.random.default_rng(0).permutation(len(num_tokens))
    half = len(order) // 2
    matching = Matching(order[:half], order[half : 2 * half], order[2 * half :], 0)
    for batch_size, num_ranks in BATCHES:
        row: dict[str, Any] = {"batch": batch_size, "ranks": num_ranks}
        for name, packs in (("padded", False), ("packed", True)):
            row[name] = expected_useful_share(
                matching,
                num_tokens,
                batch_size=batch_size,
                micro_batch_tokens=MICRO_BATCH_TOKENS,
                num_ranks=num_ranks,
                packs=packs,
                square_share=0.0,
                num_steps=STEPS,
            )
        rows.append(row)
        print(row, flush=True)
    if options.out is not None:
        machine = side_by_side.machine(torch.device("cpu"), "benchmarks/packing.py")
        content = {**machine, "examples": len(num_tokens), "rows": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
