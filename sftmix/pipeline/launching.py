"""Starts the processes of a run on this machine through DeepSpeed's own launcher."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from sftmix.config.schema import Config
from sftmix.liveness.stopping import EXIT_CODE, INTERRUPTED, STOP_FILE, acknowledge
from sftmix.pipeline import guard

GRACE_SECONDS = 60.0  # that other commands have to end, after one has: their ranks have heard of it by heartbeat
RUN_SCRIPT = Path(__file__).resolve().parent / "launch" / "run.py"


def launch(config: Config, config_path: str, overrides: list[str], *, only: str | None, force: bool, restart: bool) -> int:
    """Prepares the data in this process, runs `deepspeed launch/run.py` with `engine.num_processes` ranks, and returns its exit code.

    SIGTERM and SIGUSR1 ask the ranks to save and stop. DeepSpeed's launcher exits with 0 when it is killed itself, so success is
    believed only if the output is there: current, and, where it was to be made again, new.
    """
    from sftmix.pipeline.run import check_finished_work, first_unfinished_stage, folder_of_last
    from sftmix.storage.artifacts import MANIFEST

    check_finished_work(config, only, force=force)
    with guard.holding(config) as hold, _environment(config, hold.attempt) as environment:
        prepare_data(config, only, force=force, restart=restart)
        if only == "data":
            return 0
        goal = folder_of_last(config, only) / MANIFEST
        before = goal.stat().st_ino if goal.exists() else None
        options = [*(["--stage", only] if only else []), *(["--force"] if force else []), *(["--restart"] if restart else [])]
        with asking_to_stop(config.run.dir / STOP_FILE):
            code = run_commands([[*_launcher(config), config_path, *overrides, *options]], environment)
        if code:
            return code
        unfinished = first_unfinished_stage(config, only)
        if unfinished or (only and force and goal.stat().st_ino == before):
            print(f"sftmix: the launcher ended, but {unfinished or only} was not published: it was killed. Start again.", file=sys.stderr)
            return 1
        return 0


def prepare_data(config: Config, only: str | None, *, force: bool, restart: bool) -> None:
    """Runs the data stage in this process, where it is missing or asked for: ranks that wait for it would only hold GPUs."""
    from sftmix.pipeline.run import first_unfinished_stage, run_pipeline

    if only == "data" or first_unfinished_stage(config, "data"):
        run_pipeline(config, only="data", force=force, restart=restart)


def _launcher(config: Config) -> list[str]:
    from sftmix.engine.distributed import free_port

    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_accelerators", str(config.engine.num_processes),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), str(RUN_SCRIPT),
    ]  # fmt: skip


@contextlib.contextmanager
def _environment(config: Config, attempt: int) -> Iterator[dict[str, str]]:
    """Yields the ranks' environment. This process joins its own claim too, for the stage that it runs itself."""
    from sftmix.engine.distributed import has_gpu, threads_of_rank

    os.environ[guard.ATTEMPT] = str(attempt)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(threads_of_rank(config.engine.num_threads, config.engine.num_processes)))
    if not has_gpu():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    try:
        yield environment
    finally:
        del os.environ[guard.ATTEMPT]


@contextlib.contextmanager
def asking_to_stop(stop_file: Path) -> Iterator[None]:
    """Turns SIGTERM, SIGUSR1 and SIGINT (Control-C) into a file that rank 0 looks for after each step: the launcher between would rather
    kill the ranks. SIGTERM or SIGINT again ends this process, and the ranks with it."""

    def ask(number: int, frame: FrameType | None) -> None:
        if not stop_file.parent.is_dir():  # no rank has come so far
            raise SystemExit(128 + number)
        stop_file.write_text(f"{signal.Signals(number).name} was received\n", encoding="utf-8")
        acknowledge(number)
        if number != signal.SIGUSR1:
            signal.signal(number, _end_now)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_now(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def run_commands(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> int:
    """Runs the commands side by side, until all have ended or one has failed and the others had time to end too. Returns 0, 75 or 130 where
    one ended with it, or another of their codes. None is left running here, not after an interrupt either."""
    processes: list[subprocess.Popen[bytes]] = []
    deadline = None
    try:
        for command in commands:
            # Of their own session: an interrupt from the terminal is ours to handle.
            processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True))
        while None in (codes := [process.poll() for process in processes]):
            if deadline is None and any(codes):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failed = [code for code in codes if code]
    return next((code for code in failed if code in (EXIT_CODE, INTERRUPTED)), next(iter(failed), 0))
