"""Partial scores: one atomically written file per work unit, so scoring can resume.

A unit is a fixed range of examples under one checkpoint, for any number of ranks. Its scores are
written to a temporary file, flushed, renamed, and then recorded in a manifest with size and
SHA-256, written the same way. A shard without a matching manifest is ignored. After a kill at any
point only the missing units are scored again.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sftmix.storage import faults
from sftmix.storage.failures import accessing
from sftmix.storage.files import read_record, sha256_of_file, sync_folder, write_json

SCHEMA = pa.schema([("nll_sum", pa.float64()), ("num_misses", pa.int64())])


@dataclass(frozen=True)
class UnitScores:
    """Of the examples of one unit, in dataset order. nll_sum: (n,) float64, nats over the response
    tokens. num_misses: (n,) int64, response tokens that greedy decoding would not choose. bins:
    their table (`calibration.py`); not kept in files."""

    nll_sum: NDArray[np.float64]
    num_misses: NDArray[np.int64]
    bins: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class UnitFolder:
    """The shards of one checkpoint. fingerprint: hash of everything that the scores depend on;
    shards with another one are ignored."""

    folder: Path
    fingerprint: str

    def _data(self, unit: int) -> Path:
        return self.folder / f"unit_{unit:06d}.parquet"

    def manifest(self, unit: int) -> Path:
        """Returns the path of the manifest of a unit's scores."""
        return self.folder / f"unit_{unit:06d}.json"

    def write(self, unit: int, scores: UnitScores) -> None:
        """Publishes one unit's scores."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Named by process, because a straggler of an earlier attempt must not write into the same
        # file.
        temporary = self.folder / f".unit_{unit:06d}.{socket.gethostname()}.{os.getpid()}.tmp"
        faults.point("shard.write")
        table = pa.table([pa.array(scores.nll_sum), pa.array(scores.num_misses)], schema=SCHEMA)
        with accessing(temporary), temporary.open("wb") as file:
            pq.write_table(table, file)
            faults.point("shard.flush")
            file.flush()
            os.fsync(file.fileno())
        manifest = {
            "fingerprint": self.fingerprint,
            "num_examples": len(scores.nll_sum),
            "size": temporary.stat().st_size,
            "sha256": sha256_of_file(temporary),
        }
        faults.point("shard.rename")
        temporary.replace(self._data(unit))
        faults.point("shard.manifest")
        write_json(self.manifest(unit), manifest)
        sync_folder(self.folder)
        faults.point("shard.done")

    def problem(self, unit: int, num_examples: int) -> str | None:
        """Returns why a unit must be scored (again), or None if its shard is complete."""
        manifest = read_record(self.manifest(unit))
        if manifest is None:
            return "not scored yet"
        made_from = (manifest.get("fingerprint"), manifest.get("num_examples"))
        if made_from != (self.fingerprint, num_examples):
            return "made from something else"
        data = self._data(unit)
        is_whole = (
            data.is_file()
            and data.stat().st_size == manifest["size"]
            and sha256_of_file(data) == manifest["sha256"]
        )
        return None if is_whole else "damaged"

    def pending(self, sizes: list[int]) -> list[int]:
        """Returns the units that must be scored. sizes: number of examples of each unit. Damaged
        shards are renamed and reported."""
        units = []
        for unit, size in enumerate(sizes):
            problem = self.problem(unit, size)
            data = self._data(unit)
            if problem == "damaged" and data.exists():
                aside = data.replace(data.with_suffix(".damaged"))
                print(
                    f"  {data} is damaged: set aside as {aside.name}, and scored again", flush=True
                )
            if problem is not None:
                units.append(unit)
        return units

    def read(self, unit: int) -> UnitScores:
        """Returns the scores of a unit that has no `problem`."""
        table = pq.read_table(self._data(unit))
        return UnitScores(table["nll_sum"].to_numpy(), table["num_misses"].to_numpy())
