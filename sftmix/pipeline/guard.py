"""What keeps the processes of a run honest: one writer per run folder, and ranks that end together.

`holding` makes this run the only writer of its folder (`sftmix/liveness/run_lock.py`). `start_watch` and `end_watch` start
the heartbeats of all ranks (`sftmix/liveness/heartbeats.py`) and end them: in peace where all ranks end in the same way, else with the first
cause, on all ranks.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sftmix.cluster.environment import place_of
from sftmix.config.reader import dump_config
from sftmix.config.schema import Config
from sftmix.errors import ArtifactError, SftmixError, StoppedError
from sftmix.liveness import processes, run_lock
from sftmix.liveness.heartbeats import Watch, listen
from sftmix.liveness.members import Position
from sftmix.liveness.stopping import STOP_FILE
from sftmix.storage import artifacts
from sftmix.storage.files import write_text

if TYPE_CHECKING:
    from sftmix.engine.distributed import Ranks

LOGS, SEEN = "logs", ".seen_"
ATTEMPT = "SFTMIX_ATTEMPT"  # number of the attempt that the command has claimed, for the ranks that it starts
_is_rank = place_of() is not None
# Looked for before torch is imported, which takes seconds: a launcher that ended before it is looked for is never missed.
_launchers = processes.launchers() if _is_rank else []
_watch: Watch | None = None
_stall_seconds: float | None = None


@contextlib.contextmanager
def holding(config: Config, *, is_own_disk: bool = False) -> Iterator[run_lock.Fence]:
    """Makes this run the only writer of its folder: claims it, or joins the claim of the command that started this rank, and
    shows every second that it is alive. The command, rank 0, and the leader of a disk that is not rank 0's (`is_own_disk`: the
    command has not claimed that one). Raises ArtifactError where another run writes to it.

    One that joins leaves word of how it ended for the one that claimed: launchers of many nodes lose exit codes.
    """
    given = None if is_own_disk else os.environ.get(ATTEMPT)
    if given:
        hold = run_lock.join(config.run.dir, int(given))
    else:
        _make_run_folder(config)
        hold = run_lock.claim(config.run.dir)
        (config.run.dir / STOP_FILE).unlink(missing_ok=True)  # it was meant for an earlier start
        _own_extensions(config.run.dir / "extensions")
    artifacts.before_publishing(hold.check)
    done = threading.Event()
    thread = threading.Thread(target=_renew_until, args=(hold, done), daemon=True)
    thread.start()
    outcome = None
    try:
        yield hold
        outcome = 0
    except StoppedError as stopped:
        outcome = stopped.exit_code
        raise
    finally:
        done.set()
        thread.join()
        artifacts.before_publishing(None)
        if given:
            with contextlib.suppress(OSError):  # without word of it the command takes it for a failure
                hold.note_outcome(outcome)
        else:
            with contextlib.suppress(OSError):  # a full disk: the next claim finds out by itself
                hold.release()


def _renew_until(hold: run_lock.Fence, done: threading.Event) -> None:
    while not done.wait(1.0):
        with contextlib.suppress(OSError, SftmixError):  # superseded: what is to be published will be refused
            hold.renew()


def _make_run_folder(config: Config) -> None:
    """Creates the run folder, with the resolved config in it. Refuses a folder that holds something else."""
    folder = config.run.dir
    if folder.is_symlink() and not folder.exists():
        raise ArtifactError(f"run.dir: {folder} is a link to {folder.readlink()}, which does not exist. Create it, or name another folder.")
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"run.dir: {folder} is a file. Name a folder.")
    # Ranks may have begun their logs, and looked for who shares the folder.
    is_used = folder.is_dir() and any(path.name != LOGS and not path.name.startswith(SEEN) for path in folder.iterdir())
    if is_used and not (folder / "config.yaml").is_file():
        raise ArtifactError(f"run.dir: {folder} is not empty and is no run folder. Name another, or an empty one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").is_file():
            write_text(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise ArtifactError(f"run.dir: {folder} cannot be written: {error.strerror}. Name another folder.") from None


def _own_extensions(folder: Path) -> None:
    """Lets torch build extensions in the run folder. A build that was killed leaves a lock on which every later one waits for ever,
    and says nothing; in a folder that has one writer, whose claim is new, any lock is such a one."""
    if os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder.resolve())) == str(folder.resolve()):
        for lock in folder.rglob("lock"):
            lock.unlink()


def start_watch(config: Config, ranks: Ranks, hold: run_lock.Fence | None) -> None:
    """Starts the heartbeat of this rank. All ranks call it, once they are joined; leaders of a disk with the hold of its run folder."""
    global _watch, _stall_seconds
    if (ranks.world_size == 1 and not _launchers) or _watch is not None:
        return
    places = ranks.gather_texts(str(sorted(processes.place().items(), key=str)))
    is_one_host = len(set(places)) == 1
    listener, port = listen("127.0.0.1" if is_one_host else "") if ranks.is_main else (None, 0)
    token, number = ranks.text_from_main(f"{secrets.token_hex(16)} {port}").split()
    attempts = ranks.gather_texts(str(hold.attempt if hold else 0))
    if hold is None:
        hold = run_lock.join(config.run.dir, int(attempts[ranks.storage_leader]))
        artifacts.before_publishing(hold.check)
    address = "127.0.0.1" if is_one_host else socket.gethostbyname(os.environ["MASTER_ADDR"])
    watch = Watch(
        rank=ranks.rank,
        world_size=ranks.world_size,
        address=(address, int(number)),
        token=token,
        folder=config.run.dir / LOGS,
        listener=listener,
        silent_seconds=config.limits.silent_seconds,
        on_beat=hold.check if ranks.leads_storage else None,
        launchers=_launchers,
    )
    _stall_seconds = 60 * config.limits.stall_minutes
    watch.start()
    _watch = watch  # not one that could not start, on a full disk for example


def note(*, phase: str, can_stall: bool) -> None:
    """Says what this rank begins to do, for the message if it stops doing it. can_stall: is it a fault if nothing gets on for long?
    What rank 0 does alone is no such thing."""
    if _watch is not None:
        _watch.position = Position(phase)
        _watch.stall_seconds = _stall_seconds if can_stall else None


def tick() -> None:
    """Says that this rank gets on: a micro-batch, a unit of work."""
    if _watch is not None:
        _watch.position = replace(_watch.position, ticks=_watch.position.ticks + 1)


def begin_step(step: int) -> None:
    """Says which step of training this rank is in, for the message if it ends there."""
    if _watch is not None:
        _watch.position = replace(_watch.position, step=step)


def end_watch(error: BaseException | None) -> None:
    """Ends the heartbeat: in peace, or, after an error that is this rank's alone, by ending all ranks with it (never returns then)."""
    global _watch
    watch, _watch = _watch, None
    if watch is None:
        return
    if error is None or isinstance(error, KeyboardInterrupt) or (isinstance(error, SftmixError) and error.on_all_ranks):
        watch.close()
    elif isinstance(error, SftmixError):
        watch.exit_code = 2
        watch.fail(str(error))
    else:
        watch.fail("".join(traceback.format_exception(error)).strip())
