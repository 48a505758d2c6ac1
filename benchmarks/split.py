"""The split stage on many rows: seconds and memory.

    python benchmarks/split.py [--rows 100000000] [--folder FOLDER] [--out FILE.json]

Writes a data stage's Arrow file (16 hexadecimal digits of id, lengths, one token each; every other
column is empty, since the stage reads none) and a score table of as many rows in --folder, then
runs the stage's own function in a process of its own: check of the order, exact split, lists of
indices in both orders, mix coverage of both ways to match. Memory: the largest anonymous resident
size, which is what cannot be given back; pages of mapped files are apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import side_by_side
import torch

from sftmix.cluster.liveness.progress import Progress
from sftmix.cluster.liveness.stopping import StopRequest
from sftmix.confidence.table_files import CONFIDENCE
from sftmix.config.schema import Config
from sftmix.data.prepare import SCHEMA
from sftmix.pipeline.context import StageContext
from sftmix.pipeline.stages import split
from sftmix.storage.files import write_json
from sftmix.storage.unfinished import Identity
from sftmix.train.meter import Meter

BATCH = 1 << 17
TARGETS = {"seconds": 60, "bytes": 2 << 30}


def ids_of(numbers: np.ndarray[Any, Any]) -> pa.Array:
    """Returns 16 hexadecimal digits for each number, in no order: the numbers scattered by an odd
    factor, modulo 2**64."""
    scattered = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    shifts = np.arange(60, -4, -4, dtype=np.uint64)
    text = digits[((scattered[:, None] >> shifts) & np.uint64(15)).astype(np.intp)]
    offsets = np.arange(0, 16 * len(numbers) + 1, 16, dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(numbers), pa.py_buffer(offsets), pa.py_buffer(text.tobytes())
    )


def write_inputs(folder: Path, num_rows: int) -> None:
    """Writes data/train.arrow and confidence/confidence.parquet, where they are not there for as
    many rows."""
    rng = np.random.default_rng(0)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "confidence").mkdir(exist_ok=True)
    table = pa.schema([("example_id", pa.string()), ("confidence", pa.float64())])
    with (
        pa.OSFile(str(folder / "data" / "train.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as data,
        pq.ParquetWriter(
            folder / "confidence" / CONFIDENCE, table, compression="zstd", use_dictionary=False
        ) as scores,
    ):
        for start in range(0, num_rows, BATCH):
            numbers = np.arange(start, min(start + BATCH, num_rows))
            lengths = np.minimum(2000, 1 + rng.gamma(1.2, 90, len(numbers))).astype(np.int32)
            known = {
                "example_id": ids_of(numbers),
                "input_ids": (
                    pa.FixedSizeListArray.from_arrays(lengths, 1).cast(pa.list_(pa.int32()))
                ),
                "num_tokens": lengths,
                "num_response_tokens": lengths,
            }
            columns = [
                known.get(field.name, pa.nulls(len(numbers), field.type)) for field in SCHEMA
            ]
            data.write_batch(pa.record_batch(columns, schema=SCHEMA))
            scores.write_table(
                pa.table(
                    [known["example_id"], -np.exp(rng.normal(1, 1, len(numbers)))], schema=table
                )
            )


def measure(folder: Path, results: Any) -> None:
    """Runs the stage; puts seconds, bytes and facts into `results`."""
    needed = {
        "model": {"architecture": {"model_type": "llama"}},
        "tokenizer": {"train": {"vocab_size": 300}},
        "data": {"path": "x"},
    }
    config = Config.model_validate({**needed, "run": {"dir": folder / "run"}})
    (folder / "split").mkdir(exist_ok=True)
    context = StageContext(
        config=config,
        folder=folder / "split",
        inputs={"data": folder / "data", "score": folder / "confidence"},
        work=folder / "work",
        identity=Identity("", {}, {}),
        stop=StopRequest(folder / "run"),
        progress=Progress(),
        meter=Meter(),
    )
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            peak = max(
                peak,
                *(
                    int(line.split()[1]) << 10
                    for line in status.splitlines()
                    if line.startswith("RssAnon")
                ),
            )

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    facts = split.run(context)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    with_files = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    results.put(
        {
            "seconds": seconds,
            "peak_bytes": peak,
            "peak_bytes_with_mapped_files": with_files,
            **facts,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/split-benchmark"),
        help="for the inputs (64 bytes a row) and the output",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    write_inputs(options.folder, options.rows)
    rounds = []
    for _ in range(options.rounds):
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=measure, args=(options.folder, results))
        process.start()
        rounds.append(results.get())
        process.join()
        print(
            f"  {rounds[-1]['seconds']:.1f} s, {rounds[-1]['peak_bytes'] / 2**20:,.0f} MiB",
            flush=True,
        )
    low, middle, high = side_by_side.spread([each["seconds"] for each in rounds])
    row = {"rows": options.rows, "seconds": middle, "seconds_20": low, "seconds_80": high}
    row |= {
        name: max(each[name] for each in rounds)
        for name in ("peak_bytes", "peak_bytes_with_mapped_files")
    }
    row |= {name: rounds[-1][name] for name in ("sizes", "mix_coverage")} | {"targets": TARGETS}
    print(
        f"{options.rows:,} rows: {middle:.1f} s [{low:.1f}, {high:.1f}],"
        f" {row['peak_bytes'] / 2**20:,.0f} MiB",
        flush=True,
    )
    if options.out is not None:
        write_json(
            options.out, side_by_side.machine(torch.device("cpu"), "benchmarks/split.py") | row
        )


if __name__ == "__main__":
    main()
