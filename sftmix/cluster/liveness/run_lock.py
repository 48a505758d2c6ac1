"""One writer per run folder.

A run claims its folder by creating the next file of `attempts/` (000001.json, 000002.json, ...),
which only one process can do (O_EXCL). The highest number owns the folder; a process that finds a
number higher than its own stops writing. While the owner is alive, nobody else may claim. On the
same machine the process table tells whether it is alive; from another machine its lease does, a
small file that the owner rewrites every second.

A pause between `check` and the guarded action is not covered. On one machine that is harmless,
because a living owner is not superseded. Across machines, an owner that was suspended for the whole
patience may still finish one rename.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sftmix.cluster.liveness import processes
from sftmix.errors import ArtifactError, SftmixError
from sftmix.storage.files import read_record, write_json

ATTEMPTS = "attempts"
LEASE = "lease"
NUM_KEPT = 50  # number of attempts whose files are kept as history
POLL_SECONDS = 0.1
_NAME = re.compile(r"(\d{6,})\.json")

Record = dict[str, Any]


class SupersededError(ArtifactError):
    """A later attempt owns the run folder."""


class RunLock:
    """The claim of one attempt on a run folder; created by `claim` and `join`."""

    def __init__(self, folder: Path, attempt: int, key: str):
        self.attempt = attempt
        self._folder, self._key = folder, key
        self._num_renewals = 0

    def check(self) -> None:
        """Raises SupersededError when a later attempt owns the folder, when the folder was removed
        or recreated, or when the command that began this attempt has ended it."""
        attempts = self._folder / ATTEMPTS
        last = _last_attempt(attempts)
        record = _read(attempts, max(last, self.attempt))
        if last > self.attempt:
            raise SupersededError(
                f"{self._folder}: attempt {last} ({_who(record)}) has taken over this run folder;"
                f" nothing more is written by attempt {self.attempt}."
            )
        # A user who removes the run folder and starts again begins with attempt 1.
        if record is None or record["key"] != self._key:
            raise SupersededError(
                f"{self._folder}: the file of attempt {self.attempt} is gone or another's: the run"
                " folder was removed while this run wrote to it. Nothing more is written; start"
                " again."
            )
        if "ended" in record:
            raise SupersededError(
                f"{self._folder}: attempt {self.attempt} was ended by the command that had begun"
                " it. Start again."
            )

    def renew(self) -> None:
        """Shows others that this attempt is alive; about once a second. Raises SupersededError as
        `check` does."""
        self.check()
        self._num_renewals += 1
        path = self._folder / ATTEMPTS / LEASE
        temporary = path.with_name(f".{LEASE}.{self.attempt}.{os.getpid()}.tmp")
        temporary.write_text(
            json.dumps(
                {
                    "attempt": self.attempt,
                    "key": self._key,
                    "pid": os.getpid(),
                    "counter": self._num_renewals,
                }
            )
        )
        temporary.replace(path)

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """Renews the lock every second inside, in a thread."""
        done = threading.Event()

        def renew() -> None:
            while not done.wait(1.0):
                # superseded: publishing will be refused
                with contextlib.suppress(OSError, SftmixError):
                    self.renew()

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def release(self) -> None:
        """Marks the attempt as ended: the next claim need not check its process, and ranks that
        still run end."""
        self._add(ended=_now())

    def note_outcome(self, exit_code: int | None) -> None:
        """Records how the ranks ended, for the command that began this attempt; None removes the
        record."""
        self._add(outcome=exit_code)

    def outcome(self) -> int | None:
        """Returns what `note_outcome` recorded; None if there is no record."""
        record = _read(self._folder / ATTEMPTS, self.attempt)
        found = record.get("outcome") if record is not None and record["key"] == self._key else None
        return found if isinstance(found, int) else None

    def _add(self, **facts: object) -> None:
        attempts = self._folder / ATTEMPTS
        record = _read(attempts, self.attempt)
        if record is not None and record["key"] == self._key and "ended" not in record:
            write_json(_path(attempts, self.attempt), {**record, **facts})


def claim(folder: Path, *, patience_seconds: float = 5.0) -> RunLock:
    """Claims a run folder as its next attempt.

    Raises ArtifactError if another writer is alive: immediately for one on this machine; one on
    another machine must renew its lease within the patience, otherwise it is considered dead and
    superseded.
    """
    attempts = folder / ATTEMPTS
    try:
        attempts.mkdir(parents=True, exist_ok=True)
        return _claim(folder, attempts, time.monotonic() + patience_seconds)
    except OSError as error:
        raise ArtifactError(
            f"{attempts} cannot be written ({error}). Fix its permissions or disk, or choose"
            " another run.dir."
        ) from None


def join(folder: Path, attempt: int) -> RunLock:
    """Joins an attempt that another process claimed. Raises ArtifactError if there is no such
    attempt."""
    record = _read(folder / ATTEMPTS, attempt)
    if record is None:
        raise ArtifactError(
            f"{_path(folder / ATTEMPTS, attempt)} is missing or damaged: nobody claimed this"
            " attempt. Start the run again."
        )
    return RunLock(folder, attempt, record["key"])


def holder(folder: Path, *, patience_seconds: float = 2.0) -> str | None:
    """Returns who writes to a run folder (`attempt 3, host a, pid 7`); None if nobody does. Does
    not claim. An attempt of another machine is alive if it renews its lease within the patience."""
    attempts = folder / ATTEMPTS
    last = _last_attempt(attempts)
    alive = (
        _living_owner(attempts, last, time.monotonic() + patience_seconds, is_new=False)
        if last
        else None
    )
    return None if alive is None else f"attempt {last}, {_who(alive)}"


def _claim(folder: Path, attempts: Path, deadline: float) -> RunLock:
    first = _last_attempt(attempts)
    lock = None
    while lock is None:
        last = _last_attempt(attempts)
        # An attempt that began during this check is alive, even without a lease so far.
        if (
            last
            and (alive := _living_owner(attempts, last, deadline, is_new=last > first)) is not None
        ):
            raise ArtifactError(
                f"{folder} is written by another run: attempt {last}, {_who(alive)}, since"
                f" {alive.get('started', 'just now')}. Wait for it, stop it, or choose another"
                " run.dir."
            )
        with contextlib.suppress(FileExistsError):
            lock = RunLock(folder, last + 1, _create(attempts, last + 1))
    lock.renew()
    for name, number in _listing(attempts).items():
        if number <= lock.attempt - NUM_KEPT:
            (attempts / name).unlink(missing_ok=True)
    return lock


def _create(attempts: Path, number: int) -> str:
    """Creates the file of an attempt and returns its key. Raises FileExistsError if another process
    was faster."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    key = secrets.token_hex(8)
    record: Record = {
        "attempt": number,
        **processes.namespace(),
        "pid": os.getpid(),
        "process_start": processes.start_time(os.getpid()),
        "user": user,
        "started": _now(),
        "key": key,
    }
    descriptor = os.open(_path(attempts, number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(record, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return key


def _living_owner(attempts: Path, number: int, deadline: float, *, is_new: bool) -> Record | None:
    """Returns the record of an attempt whose writer is alive, None if it has ended or died. Waits
    until `deadline` at most."""
    record = _read(attempts, number)
    # created but not yet written, or its writer died in between
    while record is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        record = _read(attempts, number)
    if record is None:
        return {} if is_new else None
    if "ended" in record:
        return None
    here = processes.namespace()
    if (
        record["process_start"] is not None
        and here["boot_id"] is not None
        and all(record[name] == here[name] for name in here)
    ):
        return record if processes.start_time(record["pid"]) == record["process_start"] else None
    if is_new:
        return record
    before = _lease(attempts)
    while time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        lease = _lease(attempts)
        if lease is not None and lease != before and lease.get("key") == record["key"]:
            return record
        if "ended" in (_read(attempts, number) or {}):
            return None
    return None


def _lease(attempts: Path) -> Record | None:
    with contextlib.suppress(OSError):
        return read_record(attempts / LEASE)
    return None


def _listing(attempts: Path) -> dict[str, int]:
    try:
        names = os.listdir(attempts)  # noqa: PTH208  (names alone are wanted)
    except FileNotFoundError:
        return {}
    return {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}


def _last_attempt(attempts: Path) -> int:
    return max(_listing(attempts).values(), default=0)


def _path(attempts: Path, number: int) -> Path:
    return attempts / f"{number:06d}.json"


def _read(attempts: Path, number: int) -> Record | None:
    """Returns the record of an attempt, None if it is missing or incomplete."""
    record = read_record(_path(attempts, number)) or {}
    needed = {"key", "pid", "host", "process_start", "boot_id", "pid_namespace"}
    return record if needed <= record.keys() else None


def _who(record: Record | None) -> str:
    return f"host {record['host']}, pid {record['pid']}" if record else "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
