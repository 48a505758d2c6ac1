"""What a checkpoint costs, and what its digests add to it.

    python benchmarks/checkpoint.py [--hidden-size 1024 --layers 4 --vocab-size 32000] [--rounds 5]
    [--folder FOLDER] [--out FILE.json]

Every round saves the state of one engine in rotating order, each file flushed: with the SHA-256 of
what is written, without any checksum, and with torch's own CRC-32 of each tensor alone; then
verifies it. In the background: how long training stands still.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import side_by_side
from step import Setup, build_config, build_work

from sftmix.engine import state
from sftmix.engine.engine import Engine
from sftmix.engine.process_group import init_ranks
from sftmix.storage import artifacts, checkpoints
from sftmix.storage.files import write_json

WITH, WITHOUT, AS_TORCH = (
    "save",
    "save without digests",
    "save without digests, with torch's CRC-32",
)
BACKGROUND = "save in the background (until training goes on)"


class FileWithoutHash(checkpoints.HashedFile):
    """Writes alone."""

    def _follow(self) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the temporary folder"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ranks = init_ranks()
    record = side_by_side.machine(ranks.device, "benchmarks/checkpoint.py")
    sizes = {"limit": 200, "max_length": 256, "batch_size": 8, "micro_batch_tokens": 2048}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        config = build_config(Setup.of(options, zero_stage=3, **sizes), folder)
        work = build_work(config, folder, num_rounds=1)
        engine = Engine(config, config.model, ranks, work.tokenizer, train=config.train)
        from sftmix.batches.collate import collate
        from sftmix.batches.cut import count_step
        from sftmix.loss.objective import Objective

        counts = count_step(work.plan, work.steps[0], work.examples.num_response_tokens)
        pieces = work.cut(0)
        for place, piece in enumerate(pieces, start=1):  # one step, so that the moments are there
            batch = collate(work.examples, work.plan, piece, pad_id=work.tokenizer.pad_token_id)
            engine.forward_backward(batch, counts, Objective(), is_last=place == len(pieces))
        engine.step(learning_rate=1e-4)

        def save(*, in_background: bool = False) -> tuple[state.StateFiles, float]:
            target = folder / "state"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            os.sync()
            start = time.perf_counter()
            files = engine.save_state(target, in_background=in_background)
            stood_still = time.perf_counter() - start
            files.wait()
            return files, stood_still

        def save_without_digests(_: int) -> tuple[state.StateFiles, float]:
            with mock.patch.object(state, "HashedFile", FileWithoutHash):
                return save()

        def save_as_torch(number: int) -> tuple[state.StateFiles, float]:
            with mock.patch.object(state, "_without_crc32", contextlib.nullcontext):
                return save_without_digests(number)

        calls: dict[str, Any] = {
            WITH: lambda _: save(),
            WITHOUT: save_without_digests,
            AS_TORCH: save_as_torch,
            BACKGROUND: lambda _: save(in_background=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        verify: list[float] = []
        for number, measured in enumerate(
            side_by_side.rounds(calls, num_rounds=1 + options.rounds, device=ranks.device)
        ):
            if number == 0:
                continue
            for each, (_, (_, stood_still)) in measured.items():
                seconds[each].append(stood_still)
            files = save()[0]
            manifest = artifacts.Manifest(checkpoints.STAGE, "", {}, {}, files.entries)
            start = time.perf_counter()
            assert checkpoints.find_problem(folder / "state", manifest, list(files.entries)) is None
            verify.append(time.perf_counter() - start)
        size = sum(entry["size"] for entry in files.entries.values())
    rows: dict[str, Any] = {"num_parameters": engine.num_parameters, "bytes": size}
    for each, values in {**seconds, "verify": verify}.items():
        low, middle, high = side_by_side.spread(values)
        rows[each] = {"seconds": middle, "seconds_20": low, "seconds_80": high}
        print(
            f"  {each:48s} {middle:7.3f} s [{low:.3f}, {high:.3f}]  {size / middle / 2**20:8,.0f}"
            " MiB/s",
            flush=True,
        )
    # Of medians: what a disk does in one save it does not do in the next.
    share = 1 - statistics.median(seconds[WITHOUT]) / statistics.median(seconds[WITH])
    rows["share of digests"] = {"ratio": share, "target": "<= 0.05"}
    print(
        f"  digests are {share:.1%} of a save (target <= 5%); {size / 2**20:,.0f} MiB,"
        f" {engine.num_parameters:,} parameters",
        flush=True,
    )
    if options.out is not None:
        write_json(options.out, record | rows)


if __name__ == "__main__":
    main()
