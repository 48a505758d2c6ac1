"""Writes two disjoint parts of Alpaca-52K: one to choose settings with, one for results.

    python benchmarks/quality/parts.py alpaca_data.json --to FOLDER

Only short examples (at most 240 characters of instruction, input and response), so that many of
them can be trained on in little time; no empty response, and no instruction with the same input
twice. settings.json has 2,000 examples and result.json all others. A study draws training and
held-out examples from its part anew with every seed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

MOST_CHARACTERS = 240
NUM_FOR_SETTINGS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("alpaca", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    examples = {
        (example["instruction"], example["input"]): example
        for example in json.loads(options.alpaca.read_text(encoding="utf-8"))
        if example["output"] and sum(map(len, example.values())) <= MOST_CHARACTERS
    }
    order = list(examples.values())
    random.Random(0).shuffle(order)
    parts = {"settings": order[:NUM_FOR_SETTINGS], "result": order[NUM_FOR_SETTINGS:]}
    options.to.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        path = options.to / f"{name}.json"
        path.write_text(json.dumps(part, ensure_ascii=False, indent=1), encoding="utf-8")
        print(f"{path}: {len(part):,} examples")


if __name__ == "__main__":
    main()
