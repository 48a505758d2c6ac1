"""The run folder: write access, free space, kind of disk, and other writers."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sftmix.cluster.liveness import run_lock
from sftmix.doctor.findings import Finding
from sftmix.errors import gib
from sftmix.storage.files import sync_folder, write_text

NETWORK = frozenset(
    "nfs nfs4 cifs smb3 smbfs afs lustre gpfs beegfs ceph glusterfs wekafs panfs orangefs pvfs2"
    " ocfs2 gfs2 9p virtiofs fuse.sshfs fuse.glusterfs fuse.juicefs fuse.ceph fuse.s3fs"
    " fuse.gcsfuse".split()
)
# They do not guarantee what a run relies on: atomic rename, and that a flush reaches the disk.
WEAK = frozenset({"fuse.s3fs", "fuse.gcsfuse", "fuse.sshfs"})


@dataclass(frozen=True)
class Mount:
    point: str
    type: str


def mounts(table: Path = Path("/proc/self/mounts")) -> list[Mount]:
    """Returns the mounts; nothing without /proc."""
    with suppress(OSError):
        rows = [line.split() for line in table.read_text(errors="replace").splitlines()]
        return [Mount(row[1].replace("\\040", " "), row[2]) for row in rows if len(row) >= 3]
    return []


def mount_of(path: Path, table: list[Mount] | None = None) -> Mount | None:
    """Returns the mount of a path; None if unknown. Of two mounts at one place the later one hides
    the other."""
    real = str(path.resolve())
    above = [
        mount
        for mount in (mounts() if table is None else table)
        if real == mount.point or real.startswith(mount.point.rstrip("/") + "/")
    ]
    return max(reversed(above), key=lambda mount: len(mount.point), default=None)


def is_network(mount: Mount | None) -> bool:
    return mount is not None and mount.type in NETWORK


def nearest_folder(path: Path) -> Path:
    """Returns the path itself, or its nearest parent that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def check_writable(folder: Path) -> list[Finding]:
    """Writes, flushes and renames a file at the place of the run folder: publishing needs all
    three."""
    item, place = "run folder", nearest_folder(folder)
    if not place.is_dir():
        return [
            Finding(
                item,
                "bad",
                f"{place} is not a folder.",
                "Choose another run.dir, or move what is there.",
            )
        ]
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor.", dir=place) as name:
            path = Path(name, "published")
            write_text(path, "doctor")  # writes another file, flushes it and renames it
            sync_folder(path.parent)
            is_whole = path.read_bytes() == b"doctor"
    except OSError as error:
        remedy = "Fix its permissions or disk, or choose another run.dir."
        return [
            Finding(item, "bad", f"{place} cannot be written: {error.strerror or error}.", remedy)
        ]
    seconds = time.monotonic() - started
    if not is_whole:
        return [
            Finding(
                item,
                "bad",
                f"{place}: a file read back after its rename differs from what was written.",
                "Fix the disk.",
            )
        ]
    is_slow = seconds >= 2
    where = "" if place == folder.absolute() else f" (the run will make {folder})"
    found = f"{place}{where} takes a write, a flush and a rename, in {seconds:.3f} s."
    return [
        Finding(
            item,
            "warning" if is_slow else "ok",
            found,
            "Checkpoints will be slow there." if is_slow else "",
            {"seconds": seconds},
        )
    ]


def check_space(folder: Path, *, needed_bytes: int, meaning: str) -> list[Finding]:
    """meaning: what needs the bytes, for the message."""
    place = nearest_folder(folder)
    free = shutil.disk_usage(place).free
    facts = {"free_bytes": free, "needed_bytes": needed_bytes}
    found = f"{gib(free)} free in {place}; the run needs about {gib(needed_bytes)} ({meaning})."
    if free < needed_bytes:
        return [
            Finding(
                "free space",
                "bad",
                found,
                "Free some, lower checkpoint.keep_last, or use a run.dir on another volume.",
                facts,
            )
        ]
    if free < 1.2 * needed_bytes:
        return [Finding("free space", "warning", found, "That is close; free some.", facts)]
    return [Finding("free space", "ok", found, facts=facts)]


def check_file_system(folder: Path, table: list[Mount] | None = None) -> list[Finding]:
    """Names the disk. Other nodes check whether they share it: they look for a file that is written
    here."""
    item, mount = "file system", mount_of(nearest_folder(folder), table)
    if mount is None:
        return [Finding(item, "skipped", "the mounts of this machine cannot be read.")]
    facts = {"type": mount.type, "mount": mount.point, "is_network": is_network(mount)}
    found = f"the run folder is on {mount.type} ({mount.point})"
    if mount.type in WEAK:
        return [
            Finding(
                item,
                "bad",
                f"{found}, where a rename is not seen whole or a flush does not reach the disk.",
                "Use another disk.",
                facts,
            )
        ]
    if mount.type in ("tmpfs", "ramfs"):
        return [
            Finding(
                item,
                "warning",
                f"{found}: memory, gone after a restart.",
                "Use a disk for what is to be kept.",
                facts,
            )
        ]
    return [
        Finding(
            item,
            "ok",
            f"{found},"
            f" {'shared over the network' if is_network(mount) else 'a disk of this machine'}.",
            facts=facts,
        )
    ]


def check_writer(folder: Path) -> list[Finding]:
    """Checks whether another running process writes to the folder."""
    holder = run_lock.holder(folder, patience_seconds=2.0) if folder.is_dir() else None
    if holder is None:
        return [Finding("other runs", "ok", f"nobody writes to {folder}.")]
    return [
        Finding(
            "other runs",
            "bad",
            f"{folder} is written by {holder}.",
            "Wait for it, stop it, or choose another run.dir.",
        )
    ]
