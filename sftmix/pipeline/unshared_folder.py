"""A run folder that is not on shared storage: each node has its own, at the same path.

The folder of rank 0 is authoritative. What a stage reads is copied from there to the other disks
through the process group, and verified. Scores of other nodes are copied to rank 0. Training state
stays on the disk of the node that wrote it (`sftmix/train/checkpointing.py`).

The leader of a disk is the lowest rank that sees it (`Ranks.leads_storage`); it does what only one
process may do there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import torch

from sftmix.cluster.liveness.progress import Progress
from sftmix.cluster.liveness.run_lock import RunLock
from sftmix.confidence.units import UnitFolder, UnitScores
from sftmix.config.schema import Config
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.pipeline.guard import SEEN, Guard, holding
from sftmix.storage import artifacts
from sftmix.storage.files import write_text

# time within which a network file system shows a new name
LOOK_SECONDS = 5.0
CHUNK_BYTES = 16 << 20
UNITS_AT_ONCE = 256
# folders in which this process has verified a manifest's files
_verified: set[tuple[Path, str]] = set()


def find_storage(ranks: Ranks, folder: Path) -> Ranks:
    """Returns the ranks with `storage` filled in: who shares the run folder with whom. Collective:
    all ranks must call it, after rank 0 has created its folder.

    Every node's first rank writes a name into the folder, and each rank looks for the lowest one.
    Raises ArtifactError, on all ranks, if a node cannot create the folder.
    """
    if ranks.world_size == 1:
        return ranks
    token = ranks.text_from_main(secrets.token_hex(8))
    marks = [folder / f"{SEEN}{token}_{rank}" for rank in range(ranks.world_size)]
    problem = ""
    if ranks.local_rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            marks[ranks.rank].touch()
            # left by an attempt that was killed meanwhile
            for left in folder.glob(f"{SEEN}*") if ranks.is_main else []:
                if token not in left.name:
                    left.unlink(missing_ok=True)
        except OSError as error:
            problem = (
                f"run.dir: {folder} cannot be written on {socket.gethostname()} ({error.strerror})."
                " Fix it, or name another folder."
            )
    agree(ranks, problem)
    deadline = time.monotonic() + LOOK_SECONDS
    while not marks[0].exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    leader = next((rank for rank, mark in enumerate(marks) if mark.exists()), ranks.rank)
    storage = tuple(int(text) for text in ranks.gather_texts(str(leader)))
    if ranks.local_rank == 0:
        marks[ranks.rank].unlink(missing_ok=True)
    if not any(storage):
        return ranks
    ranks = replace(ranks, storage=storage)
    ranks.join_leaders()
    return ranks


def say_storage(ranks: Ranks, config: Config) -> None:
    """Reports once which nodes do not see rank 0's run folder, and what every node must have.
    Collective: all ranks must call it."""
    if ranks.is_storage_shared:
        return
    names = ranks.gather_texts(socket.gethostname())
    others = sorted({name for name, leader in zip(names, ranks.storage, strict=True) if leader})
    if ranks.is_main:
        needed = [
            str(Path(model.path).absolute())
            for model in config.models.values()
            if model.path is not None and Path(model.path).exists()
        ]
        own_json = config.engine.deepspeed  # otherwise a file of the package, which every node has
        needed += [str(own_json)] if own_json is not None and own_json.is_file() else []
        print(
            f"run.dir is not shared: {config.run.dir.absolute()} on {', '.join(others)} is not the"
            f" one on {names[0]}, which counts.\n  Copied from there when a stage needs it: data,"
            " models of earlier stages, split.\n  Kept on each node's own disk: training state, so"
            " that a run goes on only on the same nodes in the same order.\n  Must be the same on"
            " every node, shared or copied: the config file, sftmix and its packages"
            + "".join(f", {path}" for path in dict.fromkeys(needed)),
            flush=True,
        )


def hold_others(ranks: Ranks, config: Config, held: contextlib.ExitStack) -> RunLock | None:
    """Makes this run the only writer of every other disk's run folder too. Collective: all ranks
    must call it. Returns this rank's claim; None for a rank that leads no disk and for rank 0.
    Raises ArtifactError, on all ranks, if a folder has another writer."""
    if ranks.is_storage_shared:
        return None
    hold, problem = None, ""
    if ranks.leads_storage and not ranks.is_main:
        try:
            hold = held.enter_context(holding(config))
        except ArtifactError as error:
            problem = f"on {socket.gethostname()}: {error}"
    agree(ranks, problem)
    return hold


def agree(ranks: Ranks, problem: str) -> None:
    """Raises ArtifactError with the first rank's problem on all ranks, if any has one. Collective:
    all ranks must call it."""
    first = ranks.first_text(problem)
    if first:
        raise ArtifactError(first, on_all_ranks=True)


def copy_to_others(ranks: Ranks, folder: Path, guard: Guard) -> None:
    """Copies a published folder of rank 0 to every disk that does not have it unchanged.
    Collective: all ranks must call it.

    Raises ArtifactError, on all ranks, if it cannot be read or written, or arrives damaged.
    """
    if ranks.is_storage_shared:
        return
    text = ranks.text_from_main(
        (folder / artifacts.MANIFEST).read_text(encoding="utf-8") if ranks.is_main else ""
    )
    manifest = artifacts.Manifest(**json.loads(text))
    needs = ranks.leads_storage and not ranks.is_main and not _has(folder, manifest)
    names = sorted(
        {name for name in ranks.gather_texts(socket.gethostname() if needs else "") if name}
    )
    if not names:
        return
    if ranks.is_main:
        size = sum(entry["size"] for entry in manifest.files.values()) / 2**20
        print(f"  {folder.name}/ is copied to {', '.join(names)}: {size:,.1f} MiB", flush=True)
    staging = folder.with_name(f".{folder.name}.staging")
    problem = ""
    if ranks.leads_storage:
        if needs:
            shutil.rmtree(staging, ignore_errors=True)
        for name, entry in manifest.files.items():
            found = _send(
                ranks, folder / name, staging / name if needs else None, entry, guard.progress
            )
            problem = problem or found
    agree(ranks, problem)
    if needs:
        try:
            write_text(staging / artifacts.MANIFEST, text)
            artifacts.replace_folder(
                staging, folder, check=guard.lock.check if guard.lock is not None else None
            )
            _verified.add((folder, manifest.digest))
        except (OSError, ArtifactError) as error:
            problem = f"{folder} cannot be written on {socket.gethostname()}: {error}"
    agree(ranks, problem)


def _has(folder: Path, manifest: artifacts.Manifest) -> bool:
    """Returns whether this disk has the files of the manifest."""
    if (folder, manifest.digest) in _verified:
        return True
    with contextlib.suppress(ArtifactError):  # damaged, or from an earlier attempt: it is replaced
        if artifacts.read_manifest(folder) == manifest:
            artifacts.verify(folder)
            _verified.add((folder, manifest.digest))
            return True
    return False


def _send(
    ranks: Ranks, source: Path, target: Path | None, entry: dict[str, object], progress: Progress
) -> str:
    """Sends one file of rank 0 to the leaders; those with a `target` write it. Returns the error on
    this rank: after an error all continue to the end of the file, because the others wait for
    it."""
    size, problem, digest = int(str(entry["size"])), "", hashlib.sha256()
    with contextlib.ExitStack() as closing:
        file: IO[bytes] | None = None
        try:
            if ranks.is_main:
                file = closing.enter_context(source.open("rb"))
            elif target is not None:
                target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file = closing.enter_context(target.open("wb"))
        except OSError as error:
            problem = f"{error.filename} on {socket.gethostname()}: {error.strerror}"
        for start in range(0, size, CHUNK_BYTES):
            progress.tick()
            length = min(CHUNK_BYTES, size - start)
            content = b""
            try:
                if ranks.is_main and file is not None:
                    content = file.read(length)
                content = ranks.bytes_to_leaders(content, length)
                if target is not None and file is not None and not problem:
                    digest.update(content)
                    file.write(content)
            except OSError as error:
                problem = (
                    problem or f"{target or source} on {socket.gethostname()}: {error.strerror}"
                )
                if ranks.is_main:
                    ranks.bytes_to_leaders(b"", length)
        try:
            if target is not None and file is not None and not problem:
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = f"{target} on {socket.gethostname()}: {error.strerror}"
    if target is not None and not problem and digest.hexdigest() != entry["sha256"]:
        problem = (
            f"{source} did not come to {socket.gethostname()} as its manifest says (SHA-256). Run"
            " its stage again."
        )
    return problem


def collect_units(ranks: Ranks, shards: UnitFolder, sizes: list[int]) -> None:
    """Copies scores that rank 0's disk lacks from other disks to it. Collective: all ranks must
    call it. sizes: examples of each unit."""
    if ranks.is_storage_shared:
        return
    lacking = ranks.from_main(
        [unit for unit, size in enumerate(sizes) if shards.problem(unit, size) is not None]
        if ranks.is_main
        else []
    )
    for start in range(0, len(lacking), UNITS_AT_ONCE):
        units = lacking[start : start + UNITS_AT_ONCE]
        rows = [torch.zeros(0, 3, dtype=torch.float64)]
        for unit in units if ranks.leads_storage and not ranks.is_main else []:
            if shards.problem(unit, sizes[unit]) is None:
                scores = shards.read(unit)
                rows.append(
                    torch.from_numpy(
                        np.stack(
                            [np.full(sizes[unit], unit), scores.nll_sum, scores.num_misses], axis=1
                        )
                    )
                )
        table = ranks.gather_rows(torch.cat(rows)).numpy()
        for unit in units if ranks.is_main else []:
            # two attempts may have written the same unit on two disks
            found = table[table[:, 0] == unit][: sizes[unit]]
            if len(found):
                shards.write(unit, UnitScores(found[:, 1].copy(), found[:, 2].astype(np.int64)))
