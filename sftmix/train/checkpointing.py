"""Save and stop a training stage; `resuming.py` loads what is saved.

Collective: all ranks must call every method together. A checkpoint has DeepSpeed's state (of the
model, or with LoRA of the adapters; optimiser; loss scaler), the log's running sums, and the scores
collected by `online`. Everything else (order of the data, pairs, lam, learning rate, dropout) is a
function of the step. So a resumed run has the same losses and weights as an uninterrupted one, bit
for bit on the same number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.cluster.liveness.stopping import StopRequest, exit_code_of
from sftmix.config.schema import CheckpointConfig
from sftmix.engine.process_group import use_threads
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError, StoppedError
from sftmix.storage import artifacts, faults, provenance
from sftmix.storage.checkpoints import (
    ADAM_BYTES,
    STAGE,
    CheckpointFolder,
    check_space,
)
from sftmix.storage.files import await_visible, sha256_of_file
from sftmix.train.resuming import CheckpointReader, Resumable, step_of

if TYPE_CHECKING:
    from sftmix.engine.engine import Engine
    from sftmix.engine.state import StateFiles

NOT_HASHED = ("metrics.jsonl", "skipped_steps.jsonl")  # of what is kept: they grow


@dataclass
class _Pending:
    """A checkpoint that is being written in the background."""

    step: int
    staging: Path
    files: StateFiles
    facts: dict[str, Any]
    started: float


class TrainingCheckpoints:
    """Saves the checkpoints of one training stage, and resumes from them.

    kept: a folder of the stage's finished outputs (exports, metrics), whose files a checkpoint
    manifest also covers. fingerprint, settings, inputs: of the stage; a checkpoint with another
    fingerprint is refused. check: raises if this process may no longer publish.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        kept: Path,
        config: CheckpointConfig,
        stop: StopRequest,
        *,
        fingerprint: str,
        settings: dict[str, Any],
        inputs: dict[str, str],
        check: Callable[[], None] | None = None,
    ):
        self.ranks, self.kept, self.config, self.stop = ranks, kept, config, stop
        self.checkpoints = CheckpointFolder(folder, config.keep_last, config.keep_every, check)
        self._identity: dict[str, Any] = {
            "stage": STAGE,
            "fingerprint": fingerprint,
            "settings": settings,
            "inputs": inputs,
        }
        self._pending: _Pending | None = None
        self._last_saved = time.monotonic()
        self._last_step, self._needed = 0, 0
        # of kept files: size, time of change, entry
        self._digests: dict[str, tuple[int, int, dict[str, Any]]] = {}

    def resume(self, engine: Engine, parts: dict[str, Resumable]) -> int:
        """Loads the newest checkpoint that verifies, and returns its step; 0 if there is none.
        Damaged ones are renamed and reported."""
        reader = CheckpointReader(self.ranks, self.checkpoints, self.kept, self._identity)
        self._last_step, self._last_saved = reader.resume(engine, parts), time.monotonic()
        return self._last_step

    def end_step(
        self,
        engine: Engine,
        step: int,
        *,
        is_last: bool,
        parts: dict[str, Resumable],
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Saves within `pause()` if a save is due, and stops if that was requested.

        Raises StoppedError, after the state is published.
        """
        every = self.config.every_steps
        minutes = (time.monotonic() - self._last_saved) / 60
        is_due = (every is not None and step % every == 0) or (
            self.ranks.is_main
            and self.config.every_minutes is not None
            and minutes >= self.config.every_minutes
        )
        is_busy = self._pending is not None and not self._pending.files.is_done
        should_stop, should_save, any_busy = self.ranks.agree(
            [self.stop.reason is not None, is_due, is_busy]
        )
        must_publish = self._pending is not None and (
            not any_busy or should_save or should_stop or is_last
        )
        must_save = (should_save or should_stop) and not is_last
        if must_publish or must_save:
            with pause():
                if must_publish:
                    self._publish_pending()
                if must_save:
                    self._save(
                        engine,
                        step,
                        parts,
                        in_background=self.config.asynchronous and not should_stop,
                    )
        if should_stop and not is_last:
            reason = self.ranks.first_text(self.stop.reason or "")
            raise StoppedError(
                f"stopped after step {step}: {reason}. The state is saved; the same command"
                " resumes from here",
                exit_code_of(reason),
            )

    def remove_outdated(self, folder: Path, step: int) -> None:
        """Removes exports in `folder`, called step_N, that newer ones replace. One stays for each
        state that a run may go on from: the newest that the state knows. step: of the newest."""
        if not self.ranks.is_main:
            return
        states = [*self.checkpoints.steps(), *([self._pending.step] if self._pending else [])]
        found = [(step_of(path), path) for path in folder.iterdir()]
        exports = {number: path for number, path in found if number is not None}
        known = [[export for export in exports if export <= state] for state in [*states, step]]
        needed = {max(each) for each in known if each}
        for export, path in exports.items():
            if export not in needed:
                shutil.rmtree(path)

    def _save(
        self, engine: Engine, step: int, parts: dict[str, Resumable], *, in_background: bool
    ) -> None:
        started = time.perf_counter()
        staging = self.checkpoints.folder / f".step_{step:06d}"
        self._together(
            step, lambda: self._make_room(engine, step) if self.ranks.leads_storage else None
        )
        await_visible(staging)
        files = engine.save_state(staging, in_background=in_background)
        numbers: dict[str, list[dict[str, float]]] = {}
        arrays: dict[str, NDArray[np.float64]] = {}
        for name, part in parts.items():
            mine, shared = part.progress()
            rows = self.ranks.gather_rows(
                torch.tensor([list(mine.values())], dtype=torch.float64)
            ).tolist()
            numbers[name] = [dict(zip(mine, row, strict=True)) for row in rows]
            arrays |= {f"{name}.{key}.npy": array for key, array in shared.items()}
        if self.ranks.leads_storage and files.error is None:
            files.save_arrays(staging, arrays)
        facts = {
            "step": step,
            "world_size": self.ranks.world_size,
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            "num_threads": use_threads(None),
            "packs": engine.packs,
            "frozen": engine.frozen_checksum(),
            "numbers": numbers,
            "storage": list(self.ranks.storage),
            "leader": self.ranks.storage_leader,
        }
        self._pending = _Pending(step, staging, files, facts, started)
        self._last_saved = time.monotonic()
        if not in_background:
            self._publish_pending()

    def _make_room(self, engine: Engine, step: int) -> None:
        staging = self.checkpoints.new_staging(step)
        before = self.checkpoints.path(self._last_step)
        files = before.iterdir() if self._last_step and before.is_dir() else ()
        self._needed = sum(path.stat().st_size for path in files) or (
            engine.num_trained_parameters * (engine.bytes_per_weight + ADAM_BYTES)
        )
        check_space(staging, self._needed)

    def _publish_pending(self) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        pending.files.wait()
        faults.point("checkpoint.agree")
        failure = pending.files.error
        problem = self.ranks.first_text(
            f"rank {self.ranks.rank} on {socket.gethostname()}: {failure}" if failure else ""
        )
        if problem:
            free = shutil.disk_usage(self.checkpoints.folder).free / 2**20
            if self.ranks.leads_storage:
                shutil.rmtree(pending.staging)  # an incomplete checkpoint only takes space
            before = (
                f"that of step {self._last_step} is untouched"
                if self._last_step
                else "there is none before it"
            )
            # free space changes, so use rank 0's text on all ranks
            message = self.ranks.text_from_main(
                f"the checkpoint of step {pending.step} could not be written: {problem}"
                f" ({free:,.1f} MiB free in {self.checkpoints.folder}, {self._needed / 2**20:,.1f}"
                f" MiB needed); {before}. Make room or fix the disk, and start again."
            )
            raise ArtifactError(message, on_all_ranks=True)
        entries: dict[str, dict[str, Any]] = {}
        texts = self.ranks.gather_texts(json.dumps(pending.files.entries))
        for rank in self.ranks.ranks_of_storage:
            entries |= json.loads(texts[rank])

        def publish() -> None:
            facts = {**pending.facts, "kept": self._entries_of_kept(pending.step)}
            manifest = artifacts.Manifest(
                **self._identity,
                files=entries,
                facts=facts,
                versions=provenance.versions(),
                commit=provenance.commit(),
            )
            self.checkpoints.publish(pending.staging, pending.step, manifest)

        self._together(pending.step, lambda: publish() if self.ranks.leads_storage else None)
        # Only now: while a disk may lack its part of this checkpoint, all disks need the previous
        # one.
        self._together(
            pending.step, lambda: self.checkpoints.retain() if self.ranks.leads_storage else None
        )
        self._last_step = pending.step
        if self.ranks.is_main:
            size = (
                sum(entry["size"] for text in texts for entry in json.loads(text).values()) / 2**20
            )
            print(
                f"  saved after step {pending.step}: {size:,.1f} MiB in"
                f" {time.perf_counter() - pending.started:.1f} s",
                flush=True,
            )

    def _together(self, step: int, action: Any) -> None:
        """Runs what one rank of each disk does alone, so that a failure is one error on all ranks
        and no rank keeps waiting."""
        problem = ""
        try:
            action()
        except (OSError, ArtifactError) as error:
            problem = f"the checkpoint of step {step} could not be saved: {error}"
        problem = self.ranks.first_text(problem)
        if problem:
            raise ArtifactError(problem, on_all_ranks=True)

    def _entries_of_kept(self, step: int) -> dict[str, dict[str, Any]]:
        """Returns size and SHA-256 of every finished output of the stage up to `step`. Each file is
        flushed and read once. What was written after it is not of this state, which may be
        published while training goes on."""
        entries = {}
        for path in sorted(p for p in self.kept.rglob("*") if p.is_file()):
            relative = path.relative_to(self.kept)
            if any((step_of(part) or 0) > step for part in map(Path, relative.parts)):
                continue
            name, status = relative.as_posix(), path.stat()
            with path.open("rb") as file:
                if name in NOT_HASHED:
                    os.fsync(file.fileno())
                    continue
                known = self._digests.get(name)
                if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
                    os.fsync(file.fileno())
                    entry = {"size": status.st_size, "sha256": sha256_of_file(path)}
                    self._digests[name] = (status.st_size, status.st_mtime_ns, entry)
            entries[name] = self._digests[name][2]
        return entries
