"""Failures of the machine (a full disk, a denied permission, no memory), each as one line with its
remedy.

Libraries raise them as errors of many classes: safetensors, tokenizers and polars have classes of
their own, torch raises RuntimeError. An error that is not recognised here is a bug of sftmix and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sftmix.errors import MachineError, SftmixError

_ROOM = "Free some space, or use a folder on another volume, and start again."
_PERMISSION = "Correct the permissions, or use another folder."
_IN_THE_WAY = "Remove what is in the way, or use another folder."
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "Raise the limit of the size of a file (ulimit -f), or use another volume.",
    errno.EROFS: _PERMISSION,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: (
        "The disk or its connection is failing (see dmesg). Repair it, or use another volume."
    ),
    errno.ESTALE: "The network file system has lost this file. Mount it again, and start again.",
    errno.ENODEV: "The device is gone. Mount it again, or use another volume.",
    errno.ENAMETOOLONG: "Use a shorter path.",
    errno.ELOOP: "Its links go in a circle. Correct them, or use another folder.",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: _IN_THE_WAY,
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the limit of open files of the system (sysctl fs.file-max).",
    errno.EAGAIN: "Raise the limit of processes (ulimit -u, or the container's), or start fewer.",
    errno.ENOMEM: "Start fewer processes on this machine, or use one with more memory.",
}
SPACE = (errno.ENOSPC, errno.EDQUOT)
# Errors without a number are recognised by the system's text for these. The texts of other errors
# are ambiguous.
_NAMED = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.EMFILE,
)
_IN_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors, tokenizers, polars
# numpy hides the cause, which is almost always a full disk
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
_MEMORY = (
    "out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def error_number(error: BaseException) -> int | None:
    """Returns the number of the system's error (`errno`) behind an exception of any library; None
    if there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _IN_RUST.search(text):
        return int(found[1])
    if _SHORT_WRITE.search(text):
        return errno.ENOSPC
    return next((number for number in _NAMED if os.strerror(number) in text), None)


@contextlib.contextmanager
def accessing(path: Path) -> Iterator[None]:
    """Within the context, turns any library's error that comes from a failed read or write into an
    OSError that names `path`."""
    try:
        yield
    except BaseException as error:
        is_plain = isinstance(error, SftmixError) or getattr(error, "filename", None) is not None
        number = None if is_plain else error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def describe(error: OSError, folder: Path | None = None, *, needed_bytes: int | None = None) -> str:
    """Returns one line: the file, the system's text, the free and the needed space, and the remedy.

    folder: where files are written, for an error that names no file; None if only stdout is
    written.
    """
    number = error_number(error)
    path = _file_of(error)
    known = Path(path) if path else folder
    space = []
    if number in SPACE:
        free = _free_bytes(known) if known is not None else None
        space = [
            f"{_mib(count)} {word}"
            for count, word in ((free, "free"), (needed_bytes, "needed"))
            if count is not None
        ]
    words = os.strerror(number) if number is not None else str(error)
    room = f" ({', '.join(space)})" if space else ""
    path = path or (f"a file in {folder}, or stdout" if folder is not None else "stdout")
    return f"{path}: {words}{room}. {REMEDIES.get(number or 0, 'Correct it, and start again.')}"


def explain(error: BaseException, folder: Path | None = None) -> MachineError | None:
    """Returns a one-line error for an exception caused by the machine; None for any other. folder:
    as for `describe`."""
    if isinstance(error, SftmixError):
        return None
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY))
    ):
        found = " ".join(str(error).split()) or "memory cannot be allocated"
        found = re.sub(r"^\[enforce fail at [^\]]*\] .*?DefaultCPUAllocator: ", "", found)
        found = ". ".join(found.split(". ")[:2]).rstrip(".")
        return MachineError(
            f"out of memory: {found}. Lower micro_batch_tokens of `train`, `confidence` or"
            " `evaluation`, set engine.activation_checkpointing=true or engine.zero_stage=3, use"
            " more GPUs, or a smaller model. `sftmix doctor CONFIG` says how much is needed."
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return MachineError(f"a thread cannot be started. {REMEDIES[errno.EAGAIN]}")
    number = error_number(error)
    if number not in REMEDIES:
        return None
    filename = _file_of(error) if isinstance(error, OSError) else None
    return MachineError(describe(OSError(number, os.strerror(number), filename), folder))


def _file_of(error: OSError) -> str | None:
    """Returns the file that an error names; of two, the one being written."""
    named = error.filename2 or error.filename
    return str(named) if named else None


def _mib(num_bytes: int) -> str:
    mib = num_bytes / 2**20
    return f"{mib:,.1f} MiB" if mib >= 1 or num_bytes == 0 else f"{mib:.3f} MiB"


def _free_bytes(path: Path) -> int | None:
    """Returns the free space of the volume on which `path` is, or would be."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(folder).free
    return None
