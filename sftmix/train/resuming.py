"""Find, verify and load the newest checkpoint of a training stage.

Nodes with disks of their own each have the files of their ranks with their own manifest. A
checkpoint is used only if every disk has its part.
"""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sftmix.engine.process_group import use_threads
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError, counted
from sftmix.storage import artifacts, faults, provenance
from sftmix.storage.checkpoints import STAGE, CheckpointFolder, find_problem
from sftmix.storage.files import await_visible, write_text

if TYPE_CHECKING:
    from sftmix.engine.engine import Engine


class Resumable(Protocol):
    """A part of a training run with state beyond the step number."""

    def progress(self) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Returns this rank's numbers (with equal names on every rank), and arrays that are equal
        on all ranks. Collective: all ranks must call it."""

    def restore(
        self, step: int, numbers: list[dict[str, float]], arrays: dict[str, NDArray[np.float64]]
    ) -> None:
        """Continues after `step`, from the numbers of all ranks that saved, and the arrays."""


def step_of(path: Path) -> int | None:
    """Returns the step in the name of a finished output, as in step_000040 and step_000040.npy;
    None if it has none."""
    number = path.name.removeprefix("step_").split(".")[0]
    return int(number) if path.name.startswith("step_") and number.isdecimal() else None


class CheckpointReader:
    """Loads checkpoints of one training stage.

    kept: a folder of the stage's finished outputs, whose files a checkpoint manifest also covers.
    identity: stage, fingerprint, settings and inputs, as in the manifest; a checkpoint with another
    fingerprint is refused.
    """

    def __init__(
        self, ranks: Ranks, checkpoints: CheckpointFolder, kept: Path, identity: dict[str, Any]
    ):
        self.ranks, self.checkpoints, self.kept = ranks, checkpoints, kept
        self._identity = identity

    def resume(self, engine: Engine, parts: dict[str, Resumable]) -> int:
        """Loads the newest checkpoint that verifies, and returns its step; 0 if there is none.
        Damaged ones are renamed and reported."""
        started = time.perf_counter()
        while (step := self.newest()) > 0:
            problem = self.find_problem(step)
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
            self._say_differences(engine, manifest)
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
        self.ranks.barrier()
        if self.ranks.is_main:
            print(
                f"  resumed after step {step}, in {time.perf_counter() - started:.1f} s", flush=True
            )
        return step

    def newest(self) -> int:
        """Returns the newest step of which every disk has its part. Renames newer ones, left by a
        save that was killed.

        Raises ArtifactError, on all ranks, if a node has no part of what the others saved.
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

    def find_problem(self, step: int) -> str | None:
        """Returns the problem of a checkpoint, on every rank; None if there is none. The ranks
        share the reading."""
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
            beside = self.ranks.ranks_of_storage
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

    def _say_differences(self, engine: Engine, manifest: artifacts.Manifest) -> None:
        facts, threads = manifest.facts, use_threads(None)
        changed = provenance.differences(manifest.versions, provenance.versions())
        before = facts.get("num_threads")
        has_threads = self.ranks.device.type == "cpu" and before is not None
        differences = (
            (
                bool(changed),
                f"not bit for bit: the checkpoint was written by other versions:"
                f" {'; '.join(changed)}",
            ),
            (
                facts["world_size"] != self.ranks.world_size,
                f"from {facts['world_size']} to {counted(self.ranks.world_size, 'rank')}: the same"
                " examples, other rounding",
            ),
            (
                has_threads and before != threads,
                f"not bit for bit: {counted(threads, 'CPU thread')} per rank, {before} when it was"
                " saved (engine.num_threads)",
            ),
            (
                facts.get("packs", False) != engine.packs,
                "not bit for bit: micro-batches were"
                f" {'packed' if facts.get('packs') else 'padded'} before (engine.packing)",
            ),
        )
        for differs, text in differences:
            if differs:
                print(f"  {text}", flush=True)

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
        """Removes the exports and scores of steps that will be repeated."""
        if self.ranks.is_main:
            for path in list(self.kept.rglob("step_*")):
                if (step_of(path) or 0) > after:
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
