"""What builds by DeepSpeed and Triton need, and what killed processes leave behind: locks and
shared memory."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

from sftmix.doctor.checks.storage import is_network, mount_of
from sftmix.doctor.findings import Finding
from sftmix.errors import counted, gib

LOCKS, LEFTOVERS = "build locks", "shared memory"
# A running build changes its folder more often. Only an older lock is called stale, because its
# owner may be in another container.
STALE_MINUTES = 10.0
SHM = Path("/dev/shm")
_SHM_NAMES = re.compile(r"deepspeed_allreduce_buffer_.+|torch_\d+_.+|nccl-\w+|sem\.mp-\w+")


def check_compiler(*, has_gpu: bool, offloads: bool) -> list[Finding]:
    """has_gpu: Triton then compiles a small launcher. offloads: DeepSpeed then builds its Adam for
    CPUs."""
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    lacking = [] if compiler else ["a C++ compiler"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        lacking.append("the headers of Python (Python.h)")
    if shutil.which("ninja") is None:
        lacking.append("ninja")
    uses = [
        use
        for use, is_used in (
            ("Triton's kernels", has_gpu),
            ("the CPU Adam of offload_optimizer", offloads),
        )
        if is_used
    ]
    if not lacking:
        return [Finding("compiler", "ok", f"{compiler}, Python.h, ninja.")]
    found = f"missing: {', '.join(lacking)}."
    if uses:
        return [
            Finding(
                "compiler",
                "bad",
                f"{found} {' and '.join(uses)} cannot be built without.",
                "Install them (build-essential, python3-dev, ninja).",
            )
        ]
    return [
        Finding(
            "compiler", "ok", f"{found} Needed on GPUs (Triton) and for offload_optimizer only."
        )
    ]


def extension_folders() -> list[Path]:
    """Returns where torch keeps the extensions that it builds: TORCH_EXTENSIONS_DIR, or below
    ~/.cache."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(given)] if given else [Path.home() / ".cache" / "torch_extensions"]


def check_locks(
    folders: list[Path], *, fix: bool, stale_minutes: float = STALE_MINUTES
) -> list[Finding]:
    """Finds locks of builds that no process holds: every later launch would wait for them forever,
    without a message.

    torch keeps its lock file open while it builds, so the owner is the process that has it open.
    `fix` removes locks that are older than `stale_minutes`, are on a local disk, and whose owner
    would be visible from here.
    """
    locks = [
        lock
        for folder in folders
        for lock in sorted({*folder.glob("lock"), *folder.glob("*/lock"), *folder.glob("*/*/lock")})
    ]
    held = _open_files() if locks else {}
    findings = [
        finding
        for lock in locks
        if (finding := _judge_lock(lock, held, fix=fix, stale_minutes=stale_minutes)) is not None
    ]
    return findings or [Finding(LOCKS, "ok", f"none in {', '.join(map(str, folders))}.")]


def _judge_lock(
    lock: Path, held: dict[tuple[int, int], int], *, fix: bool, stale_minutes: float
) -> Finding | None:
    try:
        status = lock.lstat()
        minutes = (
            time.time() - max(path.lstat().st_mtime for path in [lock, *lock.parent.iterdir()])
        ) / 60
    except FileNotFoundError:  # released in the meantime
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    owner = held.get((status.st_dev, status.st_ino))
    if owner is not None:
        return Finding(LOCKS, "ok", f"{lock} is held by the build of pid {owner}.")
    by_hand = f"If nobody builds there, remove it: rm {lock}"
    age = counted(round(minutes), "minute")
    found = (
        f"{lock} ({age} old) is held by no process that can be seen from here; every launch would"
        " wait for it for ever."
    )
    if is_network(mount_of(lock)):
        return Finding(
            LOCKS,
            "bad",
            f"{found} Its disk is shared: a build may run on another machine.",
            by_hand,
        )
    if not _sees_processes_of(status.st_uid):
        return Finding(
            LOCKS,
            "bad",
            f"{found} It belongs to another user, whose processes cannot be looked into.",
            by_hand,
        )
    if minutes < stale_minutes:
        limit = counted(round(stale_minutes), "minute")
        return Finding(
            LOCKS, "warning", f"{found} It is too young to be called stale ({limit}).", by_hand
        )
    if not fix:
        return Finding(LOCKS, "bad", found, "Remove it with `sftmix doctor --fix`.")
    lock.unlink(missing_ok=True)
    return Finding(LOCKS, "ok", f"{lock} ({age} old, held by no process) was removed.")


def check_leftovers(folder: Path = SHM) -> list[Finding]:
    """Finds shared memory of processes that are gone: 66 MiB for each rank that was killed under
    some launchers."""
    if not folder.is_dir():
        return [Finding(LEFTOVERS, "skipped", f"there is no {folder} here.")]
    candidates = sorted(path for path in folder.iterdir() if _SHM_NAMES.fullmatch(path.name))
    held, mapped = (_open_files(), _mapped_files(folder)) if candidates else ({}, set())
    left = []
    for path in candidates:
        status = path.lstat()
        is_used = str(path) in mapped or (status.st_dev, status.st_ino) in held
        if not is_used and _sees_processes_of(status.st_uid) and time.time() - status.st_mtime > 60:
            left.append((path, status.st_size))
    if left:
        size, names = sum(size for _, size in left), " ".join(str(path) for path, _ in left[:8])
        found = f"{counted(len(left), 'file')} ({gib(size)} of memory) of processes that are gone."
        return [
            Finding(
                LEFTOVERS,
                "warning",
                found,
                f"Remove them: rm {names}{' ...' if len(left) > 8 else ''}",
                {"bytes": size, "files": len(left)},
            )
        ]
    free = shutil.disk_usage(folder).free
    return [Finding(LEFTOVERS, "ok", f"no leftovers in {folder}, {gib(free)} free.")]


def _sees_processes_of(uid: int) -> bool:
    return os.geteuid() in (0, uid)


def _open_files() -> dict[tuple[int, int], int]:
    """Returns (device, inode) -> pid of the files that processes have open, as far as this user may
    see."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # ended, or owned by another user
            for descriptor in folder.iterdir():
                with suppress(OSError):
                    status = descriptor.stat()
                    found[status.st_dev, status.st_ino] = int(folder.parent.name)
    return found


def _mapped_files(folder: Path) -> set[str]:
    """Returns the paths below a folder that processes have mapped."""
    found: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            lines = maps.read_text(errors="replace").splitlines()
            found.update(line[line.index(str(folder)) :] for line in lines if f" {folder}/" in line)
    return found
