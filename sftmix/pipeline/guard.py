"""One writer per run folder, and ranks that end together.

`holding` makes this run the only writer of its folder (`sftmix/cluster/liveness/`, `run_lock.py`).
A `Guard` starts the heartbeats of all ranks (`heartbeats.py`) and ends them: quietly where all
ranks end in the same way, else with the first cause, on all ranks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import traceback
from collections.abc import Iterator, Sequence

from sftmix.cluster.liveness import processes, run_lock
from sftmix.cluster.liveness.heartbeats import Watch, listen
from sftmix.cluster.liveness.progress import Progress
from sftmix.cluster.liveness.run_lock import RunLock
from sftmix.cluster.liveness.stopping import STOP_FILE
from sftmix.config.reader import dump_config
from sftmix.config.schema import Config
from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError, SftmixError, StoppedError
from sftmix.storage.files import write_text

LOGS, SEEN = "logs", ".seen_"
# number of the attempt that the command has claimed, for the ranks that it starts
ATTEMPT = "SFTMIX_ATTEMPT"


@contextlib.contextmanager
def holding(config: Config, *, joins: bool = False) -> Iterator[RunLock]:
    """Makes this run the only writer of its folder, and renews its lease every second.

    joins: the claim of the command that started this process, if one did (ATTEMPT in the
    environment). Such a process records its outcome for that command, because launchers of several
    nodes lose exit codes. Raises ArtifactError if another run writes to the folder.
    """
    attempt = os.environ.get(ATTEMPT) if joins else None
    if attempt:
        lock = run_lock.join(config.run.dir, int(attempt))
    else:
        _make_run_folder(config)
        lock = run_lock.claim(config.run.dir)
        (config.run.dir / STOP_FILE).unlink(missing_ok=True)  # it belongs to an earlier start
        _own_extensions(config)
    outcome = None
    try:
        with lock.renewing():
            yield lock
        outcome = 0
    except StoppedError as stopped:
        outcome = stopped.exit_code
        raise
    finally:
        # a full disk: the command treats it as a failure, and the next claim finds out by itself
        with contextlib.suppress(OSError):
            if attempt:
                lock.note_outcome(outcome)
            else:
                lock.release()


def _make_run_folder(config: Config) -> None:
    """Creates the run folder with the resolved config. Refuses a folder with other content."""
    folder = config.run.dir
    if folder.is_symlink() and not folder.exists():
        raise ArtifactError(
            f"run.dir: {folder} is a link to {folder.readlink()}, which does not exist. Create it,"
            " or name another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"run.dir: {folder} is a file. Name a folder.")
    # Ranks may already have started their logs and checked who shares the folder.
    is_used = folder.is_dir() and any(
        path.name != LOGS and not path.name.startswith(SEEN) for path in folder.iterdir()
    )
    if is_used and not (folder / "config.yaml").is_file():
        raise ArtifactError(
            f"run.dir: {folder} is not empty and is not a run folder. Name another,"
            " or an empty one."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").is_file():
            write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise ArtifactError(
            f"run.dir: {folder} cannot be written: {error.strerror}. Name another folder."
        ) from None


def _own_extensions(config: Config) -> None:
    """Makes torch build extensions in the run folder. A killed build leaves a lock for which later
    builds wait silently. This folder has one writer, which has just claimed it, so any lock in it
    is stale."""
    folder = config.run.dir / "extensions"
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder.resolve())) == str(
        folder.resolve()
    ):
        for lock in folder.rglob("lock"):
            lock.unlink()


class Guard:
    """The heartbeat of this rank, from `start` to `end`.

    launchers: the processes that started this one, found at its start, because a launcher that ends
    during the slow import of torch must be noticed. lock: of the run folder, on the ranks that lead
    a disk.
    """

    def __init__(self, config: Config, launchers: Sequence[processes.Process] = ()):
        self.progress = Progress()
        self.lock: RunLock | None = None
        self._config, self._launchers = config, launchers
        self._watch: Watch | None = None

    def start(self, ranks: Ranks) -> None:
        """Starts the heartbeat. Collective: all ranks call it once they have joined."""
        if (ranks.world_size == 1 and not self._launchers) or self._watch is not None:
            return
        hosts = ranks.gather_texts(str(sorted(processes.namespace().items(), key=str)))
        is_one_host = len(set(hosts)) == 1
        listener, port = listen("127.0.0.1" if is_one_host else "") if ranks.is_main else (None, 0)
        token, number = ranks.text_from_main(f"{secrets.token_hex(16)} {port}").split()
        address = "127.0.0.1" if is_one_host else socket.gethostbyname(os.environ["MASTER_ADDR"])
        watch = Watch(
            rank=ranks.rank,
            world_size=ranks.world_size,
            address=(address, int(number)),
            token=token,
            folder=self._config.run.dir / LOGS,
            listener=listener,
            silent_seconds=self._config.limits.silent_seconds,
            stall_seconds=60 * self._config.limits.stall_minutes,
            progress=self.progress,
            on_beat=self.lock.check if self.lock is not None else None,
            launchers=self._launchers,
        )
        watch.start()
        self._watch = watch  # not if it could not start, for example on a full disk

    def end(self, error: BaseException | None) -> None:
        """Ends the heartbeat. After an error of this rank only, it ends all ranks and never
        returns."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if (
            error is None
            or isinstance(error, KeyboardInterrupt)
            or (isinstance(error, SftmixError) and error.on_all_ranks)
        ):
            watch.close()
        elif isinstance(error, SftmixError):
            watch.exit_code = 2
            watch.fail(str(error))
        else:
            watch.fail("".join(traceback.format_exception(error)).strip())
