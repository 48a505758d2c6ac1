"""Prints how far the scores of other arms of a study agree with those of one arm, seed by seed.

    python benchmarks/quality/agreement.py runs/studies/smollm2-variants sftmix half-reference

Rank correlation (Spearman) of the confidences, and the share of training examples that both splits
put into the same half. Random halves share 50%.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.confidence.definition import agreement


def scores_of(run: Path) -> tuple[list[str], NDArray[np.float64], list[str]]:
    """Returns the ids, confidences and parts of a run's training examples, in order of id."""
    scored = pq.read_table(run / "confidence" / "confidence.parquet").sort_by("example_id")
    split = pq.read_table(run / "pairing" / "split.parquet").sort_by("example_id")
    ids = scored["example_id"].to_pylist()
    assert ids == split["example_id"].to_pylist()
    return ids, scored["confidence"].to_numpy(), split["part"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="the folder of a study")
    parser.add_argument("arm", help="the arm to compare with")
    parser.add_argument("others", nargs="+", help="arms with other scores")
    options = parser.parse_args()
    trials = options.study / "trials"
    for other in options.others:
        for folder in sorted((trials / other).glob("seed_*")):
            if not (folder / "pairing").is_dir():
                print(f"{other}, {folder.name}: not scored yet")
                continue
            ids, *scores = scores_of(trials / options.arm / folder.name)
            ids_of_other, *others = scores_of(folder)
            assert ids == ids_of_other, f"{folder} has other training examples"
            found = agreement(scores[0], others[0], scores[1], others[1])
            print(
                f"{other}, {folder.name}: Spearman {found['spearman']:.3f},"
                f" same half {found['same_part']:.1%}"
            )


if __name__ == "__main__":
    main()
