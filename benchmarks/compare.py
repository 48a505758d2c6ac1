"""What changed between two files of `suite.py`, beyond noise.

    python benchmarks/compare.py BEFORE.json AFTER.json [--all]

A row has changed if the spreads of both do not overlap, and the medians are more than 3% apart.
Other rows are counted, and shown with --all. Exit code 1: something became worse.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sftmix.evaluation.page import aligned

LEAST = 0.03  # of a median: what two runs of the same code differ by without a wider spread
SAME, BETTER, WORSE, CHANGED = "within noise", "better", "WORSE", "changed"


def verdict(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Returns what became of a row."""
    apart = before["high"] < after["low"] or after["high"] < before["low"]
    ratio = after["value"] / before["value"] if before["value"] else 1.0
    if not apart or abs(ratio - 1) <= LEAST:
        return SAME
    if not after["better"]:
        return CHANGED
    return BETTER if (ratio < 1) == (after["better"] == "lower") else WORSE


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns a line for each thing other than the code that differs between two files."""
    found = []
    for name in ("device", "cpus", "cpu_threads"):
        if before[name] != after[name]:
            found.append(f"another machine: {name} {before[name]}, then {after[name]}")
    for name in sorted({*before["versions"], *after["versions"]}):
        old, new = (each["versions"].get(name, "none") for each in (before, after))
        if old != new:
            found.append(f"another version: {name} {old}, then {new}")
    return found


def compare(
    before: dict[str, Any], after: dict[str, Any]
) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Returns (verdict, cells) of every row that both have, and names of rows that one lacks."""
    old, new = ({(r["part"], r["name"]): r for r in each["rows"]} for each in (before, after))
    rows = []
    for key in [key for key in old if key in new]:
        a, b = old[key], new[key]
        cells = [f"{key[0]}: {key[1]}", *map(_cell, (a, b)), f"{b['value'] / a['value']:.3f}"]
        said = verdict(a, b)
        rows.append((said, [*cells, said]))
    alone = [
        f"only {where}: {part}: {name}"
        for where, one, other in (("before", old, new), ("after", new, old))
        for part, name in one
        if (part, name) not in other
    ]
    return rows, alone


def _cell(row: dict[str, Any]) -> str:
    return f"{row['value']:.4g} [{row['low']:.4g}, {row['high']:.4g}] {row['unit']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="also rows within noise")
    options = parser.parse_args()
    before, after = (json.loads(p.read_text()) for p in (options.before, options.after))
    print(f"before: {before['commit'][:10]}, after: {after['commit'][:10]}, {after['device']}")
    print("\n".join(differences(before, after)))
    rows, alone = compare(before, after)
    shown = [cells for said, cells in rows if options.all or said != SAME]
    if shown:
        print("\n".join(aligned(["", "before", "after", "ratio", ""], shown)))
    print("\n".join(alone))
    print(f"{sum(said == SAME for said, _ in rows)} of {len(rows)} rows within noise")
    sys.exit(any(said == WORSE for said, _ in rows))


if __name__ == "__main__":
    main()
