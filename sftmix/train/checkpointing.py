"""Save, stop and resume a training stage.

Collective: all ranks must call every method together. What is saved: DeepSpeed's state (model, or
of one with LoRA the adapters; optimiser, loss scaler), the log's running sums, and what `online`
has collected. Everything else (order of the data, pairs, lam, learning rate, dropout streams) is a
function of the step. So a resumed run's losses and weights are those of a run that nothing stopped,
bit for bit on as many ranks.

Where nodes have disks of their own, each holds the files of its ranks with its own manifest; a
checkpoint counts if all disks have their part.
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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sftmix.config.schema import CheckpointConfig
from sftmix.engine.process_group import use_threads
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError, StoppedError, counted
from sftmix.liveness.stopping import StopRequest, exit_code_of
from sftmix.storage import artifacts, faults, provenance
from sftmix.storage.checkpoints import (
    ADAM_BYTES,
    STAGE,
    CheckpointFolder,
    check_space,
    find_problem,
)
from sftmix.storage.files import await_visible, sha256_of_file, write_text

if TYPE_CHECKING:
    from sftmix.engine.engine import Engine
    from sftmix.engine.state import StateFiles

NOT_HASHED = ("metrics.jsonl", "skipped_steps.jsonl")  # of what is kept: they grow


class Resumable(Protocol):
    """Part of a training run that knows more than the step number."""

    def progress(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Returns this rank's numbers, of the same names on every rank, and arrays that are the
        same for all. Collective: all ranks must call it."""

    def restore(
        self, step: int, numbers: list[dict[str, float]], arrays: dict[str, NDArray[np.float64]]
    ) -> None:
        """Goes on after `step`, from the numbers of all ranks that saved them, and the arrays."""


@dataclass
class _Pending:
    """A checkpoint that is being written in the background."""

    step: int
    staging: Path
    files: StateFiles
    facts: dict[str, Any]
    started: float


class TrainingCheckpoints:
    """Saves, finds and loads the checkpoints of one training stage.

    kept: a folder of the stage's finished outputs so far (exports, metrics), whose files a
    checkpoint manifest covers too. fingerprint, settings, inputs: of the stage; a checkpoint of
    another is refused. check: raises where this process must not publish (any more).
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

    # ---- taking up

    def resume(self, engine: Engine, parts: dict[str, Resumable]) -> int:
        """Loads the newest checkpoint that verifies; returns its step, 0 where there is none. A
        damaged one is set aside and said."""
        started = time.perf_counter()
        while (step := self._newest()) > 0:
            problem = self._find_problem(step)
            if problem is None:
                break
            if self.ranks.leads_storage:
                aside = self.checkpoints.set_aside(step)
                print(
                    f"  checkpoint of step {step}: {problem}. Set aside as {aside}; the one before"
                    " it is used",
                    flush=True,
                )
            self.ranks.barrier()
        if step == 0:
            self._clear_kept(after=0)
            self.ranks.barrier()
            return 0
        manifest = self.checkpoints.read(step)
        if self.ranks.is_main:
            self._say_differences(manifest)
            self._clear_kept(after=step)
        self._load(engine, step, manifest)
        arrays = {
            name: np.load(self.checkpoints.path(step) / name, allow_pickle=False)
            for name in manifest.files
            if name.endswith(".npy")
        }
        for name, part in parts.items():
            mine = {
                key.removeprefix(f"{name}.").removesuffix(".npy"): array
                for key, array in arrays.items()
                if key.startswith(f"{name}.")
            }
            try:
                part.restore(step, manifest.facts["numbers"][name], mine)
            except (KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{self.checkpoints.path(step)} was saved by another version of sftmix (commit"
                    f" {manifest.commit or 'unknown'}), and its running sums have other names. Use"
                    " that version, or start over with --restart.",
                    on_all_ranks=True,
                ) from error
        self._last_step, self._last_saved = step, time.monotonic()
        self.ranks.barrier()
        if self.ranks.is_main:
            print(
                f"  resumed after step {step}, in {time.perf_counter() - started:.1f} s", flush=True
            )
        return step

    def _newest(self) -> int:
        """Returns the newest step of which every disk has its part. Newer ones, of a save that a
        kill cut short, are set aside.

        Raises ArtifactError, on all ranks, where a node has had no part in what the others saved.
        """
        if self.ranks.is_storage_shared:
            found = self.checkpoints.steps() if self.ranks.is_main else []
            return self.ranks.from_main(found[:1] or [0])[0]
        leads, folder = self.ranks.leads_storage, self.checkpoints.folder
        host, own_steps = socket.gethostname(), self.checkpoints.steps()
        own = {"host": host, "is_new": not folder.is_dir(), "steps": own_steps}
        disks = [
            json.loads(text)
            for text in self.ranks.gather_texts(json.dumps(own) if leads else "")
            if text
        ]
        strangers = [disk["host"] for disk in disks if disk["is_new"]]
        if strangers and any(disk["steps"] for disk in disks):
            raise ArtifactError(
                f"{folder} on {', '.join(strangers)} has no part of the training state that other"
                " nodes have: without shared storage it lies on the disks of the nodes that saved"
                " it. Run on the same nodes, in the same order; or start over with --restart.",
                on_all_ranks=True,
            )
        newest = max(set.intersection(*(set(disk["steps"]) for disk in disks)), default=0)
        for step in own_steps if leads else []:
            if step > newest:
                aside = self.checkpoints.set_aside(step)
                print(
                    f"  checkpoint of step {step}: not every node has its part. Set aside as"
                    f" {aside} on {host}",
                    flush=True,
                )
        return newest

    def _find_problem(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, on every rank. The ranks share the reading."""
        await_visible(self.checkpoints.path(step))
        other_layout = ""
        try:
            manifest = self.checkpoints.read(step)
        except ArtifactError as error:
            problem: str | None = str(error)
        else:
            if manifest.fingerprint != self._identity["fingerprint"]:
                self._refuse(step, manifest)
            storage, leader = manifest.facts.get("storage", []), manifest.facts.get("leader", 0)
            if storage != list(self.ranks.storage) or leader != self.ranks.storage_leader:
                other_layout = socket.gethostname()
            names = sorted(manifest.files, key=lambda name: -manifest.files[name]["size"])
            beside = self._ranks_of_disk()
            problem = find_problem(
                self.checkpoints.path(step),
                manifest,
                names[beside.index(self.ranks.rank) :: len(beside)],
            )
            if problem is None and self.ranks.is_main:
                kept = artifacts.Manifest(STAGE, "", {}, {}, manifest.facts["kept"])
                problem = find_problem(self.kept, kept, list(kept.files))
        other = self.ranks.first_text(other_layout)
        if other:
            raise ArtifactError(
                f"{self.checkpoints.path(step)} on {other} holds the part of other ranks, or was"
                " saved with a run.dir that was shared otherwise. Without shared storage a run"
                " goes on only on the same nodes, in the same order; or start over with"
                " --restart.",
                on_all_ranks=True,
            )
        return self.ranks.first_text(problem or "") or None

    def _ranks_of_disk(self) -> list[int]:
        """Returns the ranks that see this rank's run folder."""
        if self.ranks.is_storage_shared:
            return list(range(self.ranks.world_size))
        return [
            rank
            for rank, leader in enumerate(self.ranks.storage)
            if leader == self.ranks.storage_leader
        ]

    def _refuse(self, step: int, manifest: artifacts.Manifest) -> None:
        theirs, ours = (
            {"settings": each["settings"], "inputs": each["inputs"]}
            for each in (vars(manifest), self._identity)
        )
        raise ArtifactError(
            f"{self.checkpoints.path(step)} is of a run with other settings:"
            f" {'; '.join(provenance.differences(theirs, ours))}. Put them back, or remove it.",
            on_all_ranks=True,
        )

    def _say_differences(self, manifest: artifacts.Manifest) -> None:
        changed = provenance.differences(manifest.versions, provenance.versions())
        if changed:
            print(
                "  not bit for bit: the checkpoint was written by other versions:"
                f" {'; '.join(changed)}",
                flush=True,
            )
        if manifest.facts["world_size"] != self.ranks.world_size:
            print(
                f"  from {manifest.facts['world_size']} to"
                f" {counted(self.ranks.world_size, 'rank')}: the same examples, other rounding",
                flush=True,
            )
        threads, before = use_threads(None), manifest.facts.get("num_threads")
        if self.ranks.device.type == "cpu" and before not in (None, threads):
            print(
                f"  not bit for bit: {counted(threads, 'CPU thread')} per rank, {before} when it"
                " was saved (engine.num_threads)",
                flush=True,
            )

    def _load(self, engine: Engine, step: int, manifest: artifacts.Manifest) -> None:
        faults.point("resume.load")
        if manifest.facts["zero_stage"] != engine.zero_stage:
            raise ArtifactError(
                f"{self.checkpoints.path(step)} was written with"
                f" engine.zero_stage={manifest.facts['zero_stage']}, and this run has"
                f" {engine.zero_stage}: what one stage saves another cannot read. Put it back, or"
                " start over with --restart.",
                on_all_ranks=True,
            )
        if manifest.facts.get("frozen", "") != engine.frozen_checksum():
            raise ArtifactError(
                f"{self.checkpoints.path(step)} holds adapters that were trained beside other"
                " weights than those that model.path now has. Put them back, or start over with"
                " --restart.",
                on_all_ranks=True,
            )
        if engine.zero_stage == 0 or manifest.facts["world_size"] == self.ranks.world_size:
            engine.load_state(self.checkpoints.path(step))
            return
        universal = self.checkpoints.folder / f".universal_{step:06d}"
        if self.ranks.is_main:
            from sftmix.engine.state import to_universal

            shutil.rmtree(universal, ignore_errors=True)
            faults.point("resume.convert")
            to_universal(self.checkpoints.path(step), universal)
            faults.point("resume.converted")
        self.ranks.barrier()
        await_visible(universal)
        engine.load_state(universal, is_universal=True)
        self.ranks.barrier()
        if self.ranks.is_main:
            shutil.rmtree(universal)

    def _clear_kept(self, *, after: int) -> None:
        """Removes the exports and scores of steps that will be taken again."""
        if self.ranks.is_main:
            for path in self.kept.rglob("step_*"):
                number = path.name[5:].split(".")[0]
                if number.isdecimal() and int(number) > after:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            skipped = self.kept / "skipped_steps.jsonl"
            if skipped.is_file():
                lines = skipped.read_text(encoding="utf-8").splitlines(keepends=True)
                write_text(
                    skipped,
                    "".join(
                        line
                        for line in lines
                        if line.endswith("\n") and json.loads(line)["step"] <= after
                    ),
                )

    # ---- saving

    def end_step(
        self,
        engine: Engine,
        step: int,
        *,
        is_last: bool,
        parts: dict[str, Resumable],
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Saves if it is time to, within `pause()`, and stops if that was asked for.

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
            [self.stop.is_requested, is_due, is_busy]
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
        size = engine.num_trained_parameters * (engine.bytes_per_weight + ADAM_BYTES)
        if self._last_step and self.checkpoints.path(self._last_step).is_dir():
            size = sum(
                path.stat().st_size for path in self.checkpoints.path(self._last_step).iterdir()
            )
        self._needed = size
        check_space(staging, size)

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
                shutil.rmtree(pending.staging)  # half a checkpoint would only take room
            before = (
                f"that of step {self._last_step} is untouched"
                if self._last_step
                else "there is none before it"
            )
            message = (
                f"the checkpoint of step {pending.step} could not be written: {problem}"
                f" ({free:,.1f} MiB free in {self.checkpoints.folder}, {self._needed / 2**20:,.1f}"
                f" MiB needed); {before}. Make room or fix the disk, and start again."
            )
            # what is free changes from look to look
            raise ArtifactError(self.ranks.text_from_main(message), on_all_ranks=True)
        entries: dict[str, dict[str, Any]] = {}
        texts = self.ranks.gather_texts(json.dumps(pending.files.entries))
        for rank in self._ranks_of_disk():
            entries |= json.loads(texts[rank])

        def publish() -> None:
            facts = {**pending.facts, "kept": self._entries_of_kept()}
            manifest = artifacts.Manifest(
                **self._identity,
                files=entries,
                facts=facts,
                versions=provenance.versions(),
                commit=provenance.commit(),
            )
            self.checkpoints.publish(pending.staging, pending.step, manifest)

        self._together(pending.step, lambda: publish() if self.ranks.leads_storage else None)
        # Only now: as long as one disk may lack its part of this checkpoint, the one before it is
        # needed on all.
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
        and none waits for it."""
        problem = ""
        try:
            action()
        except (OSError, ArtifactError) as error:
            problem = f"the checkpoint of step {step} could not be saved: {error}"
        problem = self.ranks.first_text(problem)
        if problem:
            raise ArtifactError(problem, on_all_ranks=True)

    def _entries_of_kept(self) -> dict[str, dict[str, Any]]:
        """Returns size and SHA-256 of every finished output of the stage so far; each file is
        flushed and read once."""
        entries = {}
        for path in sorted(p for p in self.kept.rglob("*") if p.is_file()):
            name, status = path.relative_to(self.kept).as_posix(), path.stat()
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
