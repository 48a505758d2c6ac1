"""`sftmix launch`: the data here, then the ranks on all nodes, and an exit code that says what was published.

Launchers of many nodes lose exit codes: pdsh's may be that of a connection, torchrun's is 1 whatever its ranks said. So rank 0 leaves
word in the file of the attempt (`Fence.note_outcome`), and 0 is believed only if the last output is there too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sftmix.cluster import exports
from sftmix.cluster.hostfile import is_host_name, read_hostfile
from sftmix.cluster.launch_commands import ALIVE, ON_EACH_NODE, Plan, describe, make_plan, node_command, runner_command, ssh_command
from sftmix.config.reader import load_config
from sftmix.config.schema import Config
from sftmix.errors import ConfigError, counted
from sftmix.liveness.run_lock import Fence
from sftmix.liveness.stopping import EXIT_CODE, INTERRUPTED, STOP_FILE
from sftmix.pipeline import guard
from sftmix.pipeline.launching import asking_to_stop, prepare_data, run_commands

PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def launch_on_nodes(options: argparse.Namespace) -> int:
    """Returns the exit code: 0 where the last stage is published, 75 where the run was asked to stop and has saved its state."""
    if options.template is not None:
        from sftmix.cluster.templates import print_template

        return print_template(options)
    config = load_config(options.config, options.overrides)
    plan = plan_of(options)
    if options.dry_run:
        _show(plan, options.node_rank)
        return 0
    from sftmix.pipeline.preflight import check

    check(config, has_device=False)
    if options.node_rank is None:
        _check_programs(plan.launcher)
    os.umask(0o077)
    if options.node_rank:  # the first node's command claims the folder and prepares the data; these ranks join it
        with asking_to_stop(config.run.dir / STOP_FILE):
            environment = _environment(plan)
            code = run_commands([node_command(plan, options.node_rank)], environment | exports.wanted(environment, PACKAGE_ROOT))
            return _exit_code(code)
    return _launch(config, plan, options)


def _check_programs(launcher: str) -> None:
    """Raises ConfigError where the program that `launcher` starts ranks with is not installed here."""
    program = {"openmpi": "mpirun", "slurm": "srun", "pdsh": "pdsh"}.get(launcher, "ssh")
    if shutil.which(program) is None:
        raise ConfigError(
            f"--launcher {launcher} needs the program {program}, which is not in PATH. Install it, or use another --launcher."
        )


def plan_of(options: argparse.Namespace) -> Plan:
    """Returns how the ranks are started. Raises ConfigError for options that contradict each other, or the hostfile."""
    if options.hostfile is None:
        raise ConfigError("--hostfile is missing: lines of `host slots=N`. On one machine: `sftmix run CONFIG engine.num_processes=N`.")
    if options.set:
        raise ConfigError("--set belongs to --template. For a key of the config write key=value without it.")
    if options.master_port is not None and not 1 <= options.master_port <= 65535:
        raise ConfigError(f"--master-port {options.master_port} is no port (1 to 65535). Name another.")
    if options.master_addr is not None and not is_host_name(options.master_addr):
        raise ConfigError(f"--master-addr {options.master_addr[:80]!r} is no host name or address. Correct it.")
    nodes = read_hostfile(options.hostfile)
    if options.node_rank is not None:
        if options.launcher not in ON_EACH_NODE:
            raise ConfigError(f"--node-rank is for --launcher ssh and torchrun; {options.launcher} starts all nodes. Leave it out.")
        if not 0 <= options.node_rank < len(nodes):
            raise ConfigError(
                f"--node-rank is {options.node_rank}, and {options.hostfile} has {counted(len(nodes), 'node')}, counted from 0. Correct it."
            )
    arguments = [options.config, *options.overrides]
    arguments += [*(["--stage", options.stage] if options.stage else []), *(["--force"] if options.force else [])]
    arguments += ["--restart"] if options.restart else []
    return make_plan(nodes, options.hostfile, options.launcher, arguments, address=options.master_addr, port=options.master_port)


def _show(plan: Plan, node_rank: int | None) -> None:
    variables = exports.wanted(_environment(plan), PACKAGE_ROOT)
    variables[guard.ATTEMPT] = "(number of the attempt)"
    command = None if plan.launcher in ON_EACH_NODE else runner_command(plan)
    if node_rank is not None:
        command = node_command(plan, node_rank)
    print("\n".join(describe(plan, variables, command)))
    if plan.launcher in ON_EACH_NODE and node_rank is None:
        print("\nWithout --dry-run these are started over ssh; with --node-rank I, that of node I on this machine.")


def _launch(config: Config, plan: Plan, options: argparse.Namespace) -> int:
    from sftmix.pipeline.run import check_finished_work, folder_of_last
    from sftmix.storage.artifacts import MANIFEST

    only = options.stage
    check_finished_work(config, only, force=options.force)
    with guard.holding(config) as hold, _joining(hold):
        prepare_data(config, only, force=options.force, restart=options.restart)
        if only == "data":
            return 0
        hold.note_outcome(None)  # the data stage has left its own
        environment = _environment(plan)
        with asking_to_stop(config.run.dir / STOP_FILE):
            if options.node_rank is not None:
                code = run_commands([node_command(plan, 0)], environment | exports.wanted(environment, PACKAGE_ROOT))
            elif plan.launcher in ON_EACH_NODE:
                variables = exports.wanted(environment, PACKAGE_ROOT)
                code = run_commands([ssh_command(plan, number, variables) for number in range(len(plan.nodes))], environment)
            else:
                with _for_runner(plan, environment) as prepared:
                    code = run_commands([runner_command(plan)], prepared)
        return judge(code, hold.outcome(), folder_of_last(config, only) / MANIFEST)


def judge(code: int, outcome: int | None, manifest: Path) -> int:
    """Returns the exit code of the launch. code: of the launcher. outcome: what rank 0 left. manifest: of the last output."""
    if outcome == 0 and manifest.is_file():
        if code:
            print(f"sftmix: the launcher ended with {code}, but all is published", file=sys.stderr)
        return 0
    if outcome in (EXIT_CODE, INTERRUPTED):
        return outcome
    if code == 0:
        print(f"sftmix: the launcher ended, but its ranks did not publish {manifest.parent}. Start again.", file=sys.stderr)
    return _exit_code(code) or 1


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _environment(plan: Plan) -> dict[str, str]:
    """Returns the environment of what is started here, which is where that of the ranks is taken from."""
    environment = dict(os.environ)
    from sftmix.engine.distributed import threads_of_rank

    environment.setdefault("OMP_NUM_THREADS", str(threads_of_rank(None, max(node.slots for node in plan.nodes))))
    return environment


@contextlib.contextmanager
def _joining(hold: Fence) -> Iterator[None]:
    """Lets the data stage, which runs here, and the ranks join the claim of this process."""
    os.environ[guard.ATTEMPT] = str(hold.attempt)
    try:
        yield
    finally:
        del os.environ[guard.ATTEMPT]


@contextlib.contextmanager
def _for_runner(plan: Plan, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yields the environment for DeepSpeed's runner, which takes what is for the ranks from a file of ours, made anew each time; the lines
    of the user's own are in it. What DeepSpeed would send on by itself, and nobody here needs, is taken out."""
    variables = exports.wanted(environment, PACKAGE_ROOT)
    rest = {name: value for name, value in environment.items() if not name.startswith(exports.SENT_BY_DEEPSPEED)}
    meeting = {"MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port) if plan.port else None}
    given = {name: value for name, value in meeting.items() if value}
    if plan.launcher == "slurm":
        rest = {name: value for name, value in rest.items() if name not in meeting}
        yield {**rest, **exports.for_srun(variables), **given, exports.ENV_FILE: os.devnull}
        return
    if plan.launcher == "openmpi":
        variables |= given
    with tempfile.NamedTemporaryFile("w", prefix="sftmix_env_", encoding="utf-8") as file:  # for this user's eyes only (0600)
        file.write(exports.env_file_text(variables, plan.launcher))
        file.flush()
        # Else pdsh waits for hours for the ssh to a node that was cut off.
        patience = " ".join([environment.get("PDSH_SSH_ARGS_APPEND", ""), *(f"-o{option}" for option in ALIVE)]).strip()
        yield {**rest, **variables, exports.ENV_FILE: file.name, "PDSH_SSH_ARGS_APPEND": patience}
