"""Small score tables: our own, and one as somebody would write who knows nothing of sftmix."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sftmix.confidence.metadata import ScoreMetadata
from sftmix.confidence.table import write_scores

NAN = float("nan")
FINGERPRINTS = {
    "tokenizer": "t",
    "template": "p",
    "mask_policy": "m",
    "max_length": 64,
    "dtype": "bf16",
    "data": "d",
}
METADATA = ScoreMetadata(
    "checkpoints",
    [{"path": "owner/small", "revision": "abc"}],
    [10, 20],
    FINGERPRINTS,
    ["rows.jsonl"],
    {"torch": "2"},
    "c",
)
IDS = ["b", "a", "d", "c"]
COUNTS = np.array([1, 2, 4, 3])
SUMS = {20: np.array([2.0, 4.0, 1.0, 6.0]), 10: np.array([1.0, 2.0, 9.0, 0.5])}  # b and a are tied
OTHERS = {
    "ids": ["f", "e"],
    "counts": [2, 5],
    "sums": {10: np.array([1.0, 2.0]), 20: np.array([3.0, 1.0])},
}  # as arguments of `table`


def table(folder, *, ids=IDS, counts=COUNTS, sums=SUMS, **changes):
    """Writes a table; fields of METADATA may be replaced. Returns its folder."""
    folder.mkdir(parents=True)
    metadata = dataclasses.replace(METADATA, **{"checkpoints": sorted(sums), **changes})
    write_scores(
        folder, metadata, example_ids=ids, num_response_tokens=np.asarray(counts), nll_sum=sums
    )
    return folder


def own_table(path, **columns):
    """Writes a table as a user would who knows nothing of sftmix."""
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], **columns}), path)
    return path


def rows_of(path):
    return pq.read_table(path).to_pylist()
