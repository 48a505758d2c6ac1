"""Start the ranks of a run: on this machine (`sftmix run`), or on the nodes of a hostfile (`sftmix
launch`).

Launchers lose exit codes: DeepSpeed's exits with 0 when it is killed, pdsh may return the code of a
connection, torchrun always returns 1 for a failure. So rank 0 records its outcome in the file of
the attempt (`RunLock.note_outcome`), and success also requires that the last output is published.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sftmix.cluster import exports
from sftmix.cluster.environment import free_port
from sftmix.cluster.hostfile import is_host_name, read_hostfile
from sftmix.cluster.launch_commands import (
    ALIVE,
    ON_EACH_NODE,
    Plan,
    describe,
    devices_of_ranks,
    local_command,
    make_plan,
    node_command,
    runner_command,
    ssh_command,
    stage_options,
)
from sftmix.cluster.liveness.stopping import STOP_FILE, asking_to_stop
from sftmix.cluster.run_commands import run_commands
from sftmix.cluster.templates import print_template
from sftmix.config.reader import dump_config, load_config
from sftmix.config.schema import Config
from sftmix.engine.process_group import threads_of_rank
from sftmix.engine.ranks import has_gpu
from sftmix.errors import INTERRUPTED, STOPPED, ConfigError, StoppedError, TrainingError, counted
from sftmix.pipeline import preflight
from sftmix.pipeline.guard import ATTEMPT, holding
from sftmix.pipeline.run import (
    Request,
    check_finished_work,
    first_unfinished_stage,
    folder_of_last,
    run_pipeline,
)
from sftmix.storage.artifacts import MANIFEST

Environment = dict[str, str]


def run(
    config: Config | str | Path,
    overrides: Sequence[str] = (),
    *,
    stage: str | None = None,
    force: bool = False,
    restart: bool = False,
) -> Path:
    """Runs the recipe, or one stage, from Python, as `sftmix run` does. Returns the run folder.

    config: a config, or what `sftmix run` takes. overrides: `key=value`, for a config that is read
    here. force, restart: as on the command line. Call it from the main thread, which receives
    signals. Raises SftmixError for what `sftmix run` would print in one line; TrainingError if the
    ranks of `engine.num_processes` failed, and StoppedError if they were asked to stop.
    """
    loaded = config if isinstance(config, Config) else load_config(config, overrides)
    preflight.check(loaded)
    if stage in (None, *preflight.TRAIN_TARGET):
        preflight.check_memory(loaded)
    request = Request(stage, force, restart)
    mask = os.umask(0o077)  # only the user may read data and weights
    try:
        if loaded.engine.num_processes == 1:
            run_pipeline(loaded, request)
            return loaded.run.dir
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(dump_config(loaded))
            file.flush()
            code = launch_here(loaded, file.name, [], request)
    finally:
        os.umask(mask)
    if code in (STOPPED, INTERRUPTED):
        raise StoppedError("the run was stopped and has saved its state; run it again", code)
    if code:
        raise TrainingError(f"the ranks ended with exit code {code}; what they printed says why")
    return loaded.run.dir


def launch_here(
    config: Config, config_path: str, overrides: Sequence[str], request: Request
) -> int:
    """Runs `engine.num_processes` ranks on this machine, through DeepSpeed's launcher. Returns the
    exit code."""
    stage = stage_options(request.only, force=request.force, restart=request.restart)
    options = [config_path, *overrides, *stage]
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES", "") if has_gpu() else ""
    devices = devices_of_ranks(config.engine.num_processes, visible_devices)  # before any data

    def start(environment: Environment) -> int:
        if not has_gpu():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        # Choose the port only now, because the data stage may have taken hours.
        return run_commands([local_command(devices, options, port=free_port())], environment)

    threads = threads_of_rank(config.engine.num_threads, config.engine.num_processes)
    return _launch(config, request, start, threads=threads)


def launch_on_nodes(options: argparse.Namespace) -> int:
    """Runs `sftmix launch` with its parsed options. Returns the exit code: 0 if the last stage is
    published, 75 if the run was asked to stop and has saved its state."""
    if options.template is not None:
        return print_template(options)
    config = load_config(options.config, options.overrides)
    plan = plan_of(options)
    if options.dry_run:
        _show(plan, options.node_rank)
        return 0
    preflight.check(config, has_device=False)
    if options.node_rank is None:
        _check_programs(plan.launcher)
    os.umask(0o077)
    request = Request(options.stage, options.force, options.restart)
    threads = threads_of_rank(None, max(node.slots for node in plan.nodes))
    # the first node's command claims the folder and prepares the data; these ranks join it
    if options.node_rank:
        with asking_to_stop(config.run.dir / STOP_FILE):
            return _exit_code(_start(plan, options.node_rank, _environment(threads)))
    return _launch(
        config,
        request,
        lambda environment: _start(plan, options.node_rank, environment),
        threads=threads,
    )


def _launch(
    config: Config, request: Request, start: Callable[[Environment], int], *, threads: int
) -> int:
    """Claims the run folder, prepares the data in this process, starts the ranks and judges how
    they ended.

    start: runs the ranks in an environment to their end, and returns the launcher's exit code.
    """
    check_finished_work(config, request)
    with holding(config) as lock:
        # Ranks that wait for the data would block GPUs.
        if request.only == "data" or first_unfinished_stage(config, "data"):
            run_pipeline(config, replace(request, only="data"), lock=lock)
        if request.only == "data":
            return 0
        with asking_to_stop(config.run.dir / STOP_FILE):
            code = start({**_environment(threads), ATTEMPT: str(lock.attempt)})
        return judge(code, lock.outcome(), folder_of_last(config, request.only) / MANIFEST)


def _environment(threads: int) -> Environment:
    """Returns the environment of the processes started here, from which that of the ranks is
    derived."""
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def judge(code: int, outcome: int | None, manifest: Path) -> int:
    """Returns the exit code of a launch. code: of the launcher. outcome: what rank 0 recorded.
    manifest: of the last output."""
    if outcome == 0 and manifest.is_file():
        if code:
            print(f"sftmix: the launcher ended with {code}, but all is published", file=sys.stderr)
        return 0
    if outcome in (STOPPED, INTERRUPTED):
        return outcome
    if code == 0:
        print(
            f"sftmix: the launcher ended, but its ranks did not publish {manifest.parent}. Start"
            " again.",
            file=sys.stderr,
        )
    return _exit_code(code) or 1


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _start(plan: Plan, node_rank: int | None, environment: Environment) -> int:
    """Starts the ranks of all nodes, or those of one node on this machine, and waits for their
    end."""
    if node_rank is not None:
        return run_commands(
            [node_command(plan, node_rank)],
            environment | exports.wanted(environment),
        )
    if plan.launcher in ON_EACH_NODE:
        variables = exports.wanted(environment)
        return run_commands(
            [ssh_command(plan, number, variables) for number in range(len(plan.nodes))], environment
        )
    with _for_runner(plan, environment) as prepared:
        return run_commands([runner_command(plan)], prepared)


def _check_programs(launcher: str) -> None:
    """Raises ConfigError if the program of `launcher` is not installed here."""
    program = {"openmpi": "mpirun", "slurm": "srun", "pdsh": "pdsh"}.get(launcher, "ssh")
    if shutil.which(program) is None:
        raise ConfigError(
            f"--launcher {launcher} needs the program {program}, which is not in PATH. Install it,"
            " or use another --launcher."
        )


def plan_of(options: argparse.Namespace) -> Plan:
    """Returns how the ranks are started. Raises ConfigError for options that contradict each other
    or the hostfile."""
    if options.hostfile is None:
        raise ConfigError(
            "--hostfile is missing: lines of `host slots=N`. On one machine: `sftmix run CONFIG"
            " engine.num_processes=N`."
        )
    if options.set:
        raise ConfigError(
            "--set belongs to --template. For a key of the config write key=value without it."
        )
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise ConfigError(
            f"--master-port {options.master_port} is not a port (1 to 65535). Name another."
        )
    if options.master_addr is not None and not is_host_name(options.master_addr):
        raise ConfigError(
            f"--master-addr {options.master_addr[:80]!r} is not a host name or address. Correct it."
        )
    nodes = read_hostfile(options.hostfile)
    if options.node_rank is not None:
        if options.launcher not in ON_EACH_NODE:
            raise ConfigError(
                f"--node-rank is for --launcher ssh and torchrun; {options.launcher} starts all"
                " nodes. Leave it out."
            )
        if not 0 <= options.node_rank < len(nodes):
            raise ConfigError(
                f"--node-rank is {options.node_rank}, and {options.hostfile} has"
                f" {counted(len(nodes), 'node')}, counted from 0. Correct it."
            )
    stage = stage_options(options.stage, force=options.force, restart=options.restart)
    return make_plan(
        nodes,
        options.hostfile,
        options.launcher,
        [options.config, *options.overrides, *stage],
        address=options.master_addr,
        port=options.master_port,
    )


def _show(plan: Plan, node_rank: int | None) -> None:
    """Prints what would be started."""
    environment = _environment(threads_of_rank(None, max(node.slots for node in plan.nodes)))
    variables = exports.wanted(environment)
    variables[ATTEMPT] = "(number of the attempt)"
    command = None if plan.launcher in ON_EACH_NODE else runner_command(plan)
    if node_rank is not None:
        command = node_command(plan, node_rank)
    print("\n".join(describe(plan, variables, command)))
    if plan.launcher in ON_EACH_NODE and node_rank is None:
        print(
            "\nWithout --dry-run these are started over ssh; with --node-rank I, that of node I on"
            " this machine."
        )


@contextlib.contextmanager
def _for_runner(plan: Plan, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields the environment for DeepSpeed's runner.

    The runner reads the variables of the ranks from a file. This writes one, including the user's
    lines, and removes variables that DeepSpeed would send and no rank needs.
    """
    variables = exports.wanted(environment)
    rest = {
        name: value
        for name, value in environment.items()
        if not name.startswith(exports.SENT_BY_DEEPSPEED)
    }
    meeting = {"MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port) if plan.port else None}
    given = {name: value for name, value in meeting.items() if value}
    if plan.launcher == "slurm":
        rest = {name: value for name, value in rest.items() if name not in meeting}
        yield {**rest, **exports.for_srun(variables), **given, exports.ENV_FILE: os.devnull}
        return
    if plan.launcher == "openmpi":
        variables |= given
    # readable by this user only (0600)
    with tempfile.NamedTemporaryFile("w", prefix="sftmix_env_", encoding="utf-8") as file:
        file.write(exports.env_file_text(variables, plan.launcher))
        file.flush()
        # Otherwise pdsh waits for hours for ssh to an unreachable node.
        patience = " ".join(
            [environment.get("PDSH_SSH_ARGS_APPEND", ""), *(f"-o{option}" for option in ALIVE)]
        ).strip()
        yield {**rest, **variables, exports.ENV_FILE: file.name, "PDSH_SSH_ARGS_APPEND": patience}
