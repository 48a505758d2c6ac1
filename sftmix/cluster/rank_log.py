"""Copies a rank's output to a file of its own: launchers of several nodes mix the output of ranks,
and lose the end of it.

A separate process copies, so that the last lines of a killed rank are kept too. It is forked before
torch is imported, and ends when all writers have closed the pipe. Ranks wait for it only at a
normal end.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

FLUSH_SECONDS = 5.0
# Launchers signal whole trees of processes.
NOT_FOR_COPIER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGPIPE)


def start(folder: Path, rank: int) -> None:
    """From here on, the output of this process and its children is also appended to a file in
    `folder`, rank_0000.log for rank 0.

    If the file cannot be written, stderr says so and the rank continues. Call it before threads are
    started.
    """
    path = folder / f"rank_{rank:04d}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(
            log,
            f"--- {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} host {socket.gethostname()} pid"
            f" {os.getpid()}\n".encode(),
        )
    except OSError as error:
        print(
            f"sftmix: rank {rank}: {path} cannot be written ({error.strerror}): its output is here"
            " alone",
            file=sys.stderr,
            flush=True,
        )
        return
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    # until it has chosen how to handle them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_COPIER)
    copier = os.fork()
    if copier == 0:
        os.close(writing)
        _copy(reading, log)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    for descriptor in (reading, writing, log):
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    atexit.register(_finish, copier, os.getpid())


def _copy(reading: int, log: int) -> None:
    """Copies to the log and to the stdout of this process until all writers have closed; never
    returns."""
    for number in NOT_FOR_COPIER:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(BaseException):
        while part := os.read(reading, 1 << 16):
            for descriptor in (log, 1):
                # a full disk or a lost connection: the other target continues
                with contextlib.suppress(OSError):
                    _write_all(descriptor, part)
    os._exit(0)


def _write_all(descriptor: int, part: bytes) -> None:
    while part:
        part = part[os.write(descriptor, part) :]


def _finish(copier: int, owner: int) -> None:
    """Waits until everything is copied, if no other process holds the pipe: in a container the
    copier ends with the rank."""
    if os.getpid() != owner:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    deadline = time.monotonic() + FLUSH_SECONDS
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(copier, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
