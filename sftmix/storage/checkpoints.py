"""Training checkpoints on disk: atomic, and verified before use, never trusted by name.

    checkpoints/step_000120/     state files of all ranks; manifest.json with size and SHA-256
    checkpoints/latest           a hint for people and tools; never read here
    checkpoints/*.damaged        what did not verify, renamed; never deleted here

A checkpoint is written under a temporary name; every rank flushes its files; then rank 0 writes the
manifest and renames it. A crash at any point leaves the previous checkpoint unchanged.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from sftmix.errors import ArtifactError, counted
from sftmix.storage import artifacts, faults, provenance
from sftmix.storage.files import sha256_of_file, sync_folder, write_json, write_text

STAGE = "training checkpoint"
OWN_DIGEST = "manifest_sha256"
ADAM_BYTES = 12  # per parameter in a checkpoint: float32 copy and two moments


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of one training stage. keep_last: number of newest ones to keep, at least 1;
    keep_every: also keep multiples of this step. check: raises if this process may no longer
    publish."""

    folder: Path
    keep_last: int = 2
    keep_every: int | None = None
    check: Callable[[], None] | None = None

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint after `step`."""
        return self.folder / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """Returns the steps of existing checkpoints, verified or not, newest first; by number,
        because clocks may have been set back."""
        return sorted(
            (
                int(path.name[5:])
                for path in self.folder.glob("step_*")
                if path.name[5:].isdecimal()
            ),
            reverse=True,
        )

    def new_staging(self, step: int) -> Path:
        """Returns an empty folder to write a checkpoint into, and removes leftovers of killed
        attempts."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in [*self.folder.glob(".step_*"), *self.folder.glob(".universal_*")]:
            shutil.rmtree(path)
        staging = self.folder / f".step_{step:06d}"
        staging.mkdir(mode=0o700)
        return staging

    def read(self, step: int) -> artifacts.Manifest:
        """Returns a checkpoint's manifest. Raises ArtifactError if it is missing, damaged, or
        belongs to something else."""
        manifest = artifacts.read_manifest(self.path(step))
        if manifest is None:
            raise ArtifactError(f"{artifacts.MANIFEST} is missing")
        if manifest.facts.pop(OWN_DIGEST, None) != provenance.fingerprint(asdict(manifest)):
            raise ArtifactError(f"{artifacts.MANIFEST} differs from what was written")
        if manifest.stage != STAGE or manifest.facts["step"] != step:
            raise ArtifactError(f"{artifacts.MANIFEST} is not of a checkpoint of step {step}")
        return manifest

    def publish(self, staging: Path, step: int, manifest: artifacts.Manifest) -> None:
        """Publishes a checkpoint whose state files are written and flushed. Raises what `check`
        raises. Call `retain` afterwards, when every disk has its part."""
        faults.point("checkpoint.manifest")
        vouched = replace(
            manifest, facts={**manifest.facts, OWN_DIGEST: provenance.fingerprint(asdict(manifest))}
        )
        write_json(staging / artifacts.MANIFEST, asdict(vouched))
        sync_folder(staging)
        if self.check is not None:
            self.check()
        faults.point("checkpoint.rename")
        staging.rename(self.path(step))
        sync_folder(self.folder)
        faults.point("checkpoint.latest")
        write_text(self.folder / "latest", self.path(step).name + "\n")

    def retain(self) -> None:
        """Removes checkpoints that need not be kept, oldest first. Call it when the newest is
        complete."""
        steps = self.steps()
        for step in reversed(steps[max(1, self.keep_last) :]):
            if self.keep_every is None or step % self.keep_every:
                faults.point("checkpoint.retention")
                # an incomplete one is never a candidate
                self.path(step).rename(hidden := self.folder / f".step_{step:06d}.old")
                faults.point("checkpoint.removal")
                shutil.rmtree(hidden)

    def set_aside(self, step: int) -> Path:
        """Renames a checkpoint that fails verification, so that it is ignored; returns its new
        name."""
        names = (f"{self.path(step).name}.damaged{number}" for number in chain([""], count(2)))
        free = next(name for name in names if not (self.folder / name).exists())
        return self.path(step).rename(self.folder / free)


def find_problem(folder: Path, manifest: artifacts.Manifest, names: list[str]) -> str | None:
    """Returns the problem of the first of `names`, files of a checkpoint, that fails verification;
    None if all pass."""
    for name in names:
        expected, path = manifest.files[name], folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return (
                f"{name} has {counted(path.stat().st_size, 'byte')}, expected {expected['size']:,}"
            )
        if sha256_of_file(path) != expected["sha256"]:
            return f"{name} differs from what was written (SHA-256)"
    return None


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raises ArtifactError if the volume of `folder` has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ArtifactError(
            f"a checkpoint needs {needed_bytes / 2**20:,.1f} MiB in {folder}, and its volume has"
            f" {free / 2**20:,.1f} MiB free. Free some, lower checkpoint.keep_last, or use a"
            " run.dir on another volume."
        )


class HashedFile:
    """A writable file that computes its size and SHA-256. Mode 0600.

    A thread hashes what it reads back from the file, so that neither writes nor the flush wait for
    it, and the caller may reuse its memory. A failure is kept in `error`, because torch hides what
    a file object raises behind an error of its own.
    """

    CHUNK_BYTES = 1 << 20

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self.path, self.size, self._hashed = path, 0, 0
        self.error: OSError | None = None
        self._grown, self._is_complete, self._is_abandoned = threading.Condition(), False, False
        self._pool = ThreadPoolExecutor(1, "sftmix-hash")
        self._digest = self._pool.submit(self._follow)

    def write(self, content: Any) -> int:
        """Writes all of a bytes-like object."""
        view = memoryview(content).cast("B")
        try:
            written = 0
            while written < len(view):
                is_short = faults.point("checkpoint.write")
                written += os.write(
                    self._descriptor,
                    view[written : (written + len(view) + 1) // 2 if is_short else None],
                )
        except OSError as error:
            self.error = self.error or error
            raise
        with self._grown:
            self.size += len(view)
            self._grown.notify()
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def close(self) -> dict[str, Any]:
        """Flushes the file to disk; returns its entry for the manifest. Raises OSError if it cannot
        be flushed or read back."""
        try:
            with self._grown:
                self._is_complete = True
                self._grown.notify()
            faults.point("checkpoint.flush")
            os.fsync(self._descriptor)
            digest = self._digest.result()
        except OSError as error:
            self.error = self.error or error
            raise
        finally:
            self.abandon()
        return {"size": self.size, "sha256": digest}

    def abandon(self) -> None:
        """Closes the file without flushing. Calling it again does nothing."""
        if self._descriptor >= 0:
            with self._grown:
                self._is_abandoned = True
                self._grown.notify()
            self._pool.shutdown()
            os.close(self._descriptor)
            self._descriptor = -1

    def _follow(self) -> str:
        digest, chunk = hashlib.sha256(), memoryview(bytearray(self.CHUNK_BYTES))
        while True:
            with self._grown:
                self._grown.wait_for(
                    lambda: (
                        self._is_complete
                        or self._is_abandoned
                        or self.size - self._hashed >= self.CHUNK_BYTES
                    )
                )
                written = self.size
                if self._is_abandoned or self._hashed == written:
                    return digest.hexdigest()
            while self._hashed < written and not self._is_abandoned:
                count = os.preadv(self._descriptor, [chunk[: written - self._hashed]], self._hashed)
                if count == 0:
                    raise OSError(
                        errno.EIO,
                        f"ends after {self._hashed:,} of the {counted(written, 'byte')} written",
                        str(self.path),
                    )
                digest.update(chunk[:count])
                self._hashed += count
