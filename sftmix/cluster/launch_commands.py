"""The commands that start the ranks of all nodes, for each launcher, with every word quoted for the
shells on its way.

pdsh, openmpi, slurm   one command here: `deepspeed --launcher ...`
ssh, torchrun          one command on each node, started over ssh: DeepSpeed's launcher, or torchrun
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftmix.cluster.environment import DEFAULT_PORT
from sftmix.cluster.exports import for_pdsh
from sftmix.cluster.hostfile import Node
from sftmix.errors import ConfigError, counted

RUN_SCRIPT = Path(__file__).resolve().parent / "launch" / "run.py"
ON_EACH_NODE = frozenset({"ssh", "torchrun"})  # launchers that need a command on every node
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# end the connection to a node that is unreachable
ALIVE = ("ServerAliveInterval=15", "ServerAliveCountMax=3")
SSH = (
    "ssh",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    *(word for option in ALIVE for word in ("-o", option)),
)
# in paths that DeepSpeed passes to a shell unquoted
_UNQUOTED = re.compile(r"[A-Za-z0-9@+=:,./_-]+")


@dataclass(frozen=True)
class Plan:
    """arguments: of launch/run.py. address, port: where the ranks meet; None under slurm, where
    ranks can find it themselves."""

    nodes: tuple[Node, ...]
    hostfile: Path
    launcher: str
    arguments: tuple[str, ...]
    address: str | None
    port: int | None

    def ranks_of(self, number: int) -> range:
        """Returns the ranks of a node."""
        first = sum(node.slots for node in self.nodes[:number])
        return range(first, first + self.nodes[number].slots)


def make_plan(
    nodes: Sequence[Node],
    hostfile: Path,
    launcher: str,
    arguments: Sequence[str],
    *,
    address: str | None,
    port: int | None,
) -> Plan:
    """Returns how the ranks are started. Raises ConfigError for what the launcher cannot do, or
    would do differently."""
    if launcher != "slurm":  # there the ranks derive both from srun's variables
        address, port = address or nodes[0].host, port or DEFAULT_PORT
    if len(nodes) > 1 and address in LOOPBACK:
        raise ConfigError(
            f"the ranks would meet at {address}, where each node finds itself only. Name the first"
            " so that all can reach it."
        )
    if launcher == "pdsh":
        _check_for_pdsh(nodes)
    if launcher == "slurm" and len({node.slots for node in nodes}) > 1:
        found = ", ".join(f"{node.host} {node.slots}" for node in nodes)
        raise ConfigError(
            f"slots are {found}; DeepSpeed tells srun one number for all. Use as many on each node,"
            " or another --launcher."
        )
    return Plan(tuple(nodes), hostfile, launcher, tuple(arguments), address, port)


def _check_for_pdsh(nodes: Sequence[Node]) -> None:
    for node in nodes:
        if ":" in node.host:
            raise ConfigError(
                f"{node.host}: pdsh takes what is before a colon for a module. Use a name, or"
                " --launcher ssh."
            )
    for what, path in (
        ("the folder in which you are", str(Path.cwd())),
        ("Python", sys.executable),
        ("sftmix", str(RUN_SCRIPT)),
    ):
        if _UNQUOTED.fullmatch(path) is None:
            raise ConfigError(
                f"{what}, {path!r}, has letters that a shell could misread, and DeepSpeed gives it"
                " to the nodes' shells without quotes. Use a path of letters, digits and @+=:,./_-"
                " only, or --launcher ssh."
            )


def devices_of_ranks(num_ranks: int, visible_devices: str = "") -> list[str | int]:
    """Returns the device of each rank of this machine.

    visible_devices: CUDA_VISIBLE_DEVICES of the user; the ranks get the first of them. DeepSpeed's
    runner would ignore the variable; its launcher, which the runner starts, uses what it is given.
    Raises ConfigError if there are fewer devices than ranks.
    """
    devices: Sequence[str | int] = [name for name in visible_devices.split(",") if name.strip()]
    if devices and len(devices) < num_ranks:
        raise ConfigError(
            f"engine.num_processes is {num_ranks}, and CUDA_VISIBLE_DEVICES={visible_devices} names"
            f" {counted(len(devices), 'device')}. Start one process for each GPU."
        )
    return list(devices[:num_ranks] or range(num_ranks))


def local_command(
    devices: Sequence[str | int], arguments: Sequence[str], *, port: int
) -> list[str]:
    """Returns the command that starts a rank for each device of this machine alone. arguments: of
    launch/run.py."""
    launcher = _launcher({"localhost": devices}, 0, "127.0.0.1", port)
    return [*launcher, str(RUN_SCRIPT), *arguments]


def _launcher(
    hosts: Mapping[str, Sequence[str | int]], number: int, address: str | None, port: int | None
) -> list[str]:
    """Returns DeepSpeed's launcher of one node. hosts: the devices of every node, in rank order."""
    world = base64.urlsafe_b64encode(
        json.dumps({host: list(ids) for host, ids in hosts.items()}).encode()
    ).decode()
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}",
        f"--node_rank={number}", f"--master_addr={address}", f"--master_port={port}",
        "--no_local_rank", "--log_level=warning",
    ]  # fmt: skip


def runner_command(plan: Plan) -> list[str]:
    """Returns the one command that starts all ranks: DeepSpeed's runner for pdsh, openmpi or
    slurm."""
    assert plan.launcher not in ON_EACH_NODE, f"{plan.launcher} needs a command on each node"
    arguments = (
        [pdsh_argument(argument) for argument in plan.arguments]
        if plan.launcher == "pdsh"
        else list(plan.arguments)
    )
    return [
        sys.executable, "-m", "deepspeed.launcher.runner",
        "--hostfile", str(plan.hostfile.resolve()),
        "--launcher", plan.launcher,
        # reach a single node by the hostfile too: DeepSpeed would assume that it is this machine
        "--force_multi",
        "--no_local_rank",
        "--master_addr", plan.address or "unused",  # else DeepSpeed asks the first node over ssh
        "--master_port", str(plan.port or DEFAULT_PORT),
        *([] if plan.launcher == "pdsh" else ["--no_ssh_check"]),
        str(RUN_SCRIPT), *arguments,
    ]  # fmt: skip


def pdsh_argument(text: str) -> str:
    """Quotes an argument so that the shell on the node sees `text`. DeepSpeed puts an argument with
    a space between double quotes and escapes only quotes inside it; it does not quote other
    arguments."""
    return for_pdsh(re.sub(r"([\\$`])", r"\\\1", text) if " " in text else shlex.quote(text))


def node_command(plan: Plan, number: int) -> list[str]:
    """Returns the command of one node: DeepSpeed's launcher for one node, which `deepspeed
    --no_ssh` and pdsh also start, or torchrun."""
    script = [str(RUN_SCRIPT), *plan.arguments]
    if plan.launcher == "torchrun":
        return [
            sys.executable,
            "-u",
            "-m",
            "torch.distributed.run",
            "--nnodes",
            str(len(plan.nodes)),
            "--nproc-per-node",
            str(plan.nodes[number].slots),
            "--node-rank",
            str(number),
            "--master-addr",
            str(plan.address),
            "--master-port",
            str(plan.port),
            *script,
        ]
    hosts = {node.host: range(node.slots) for node in plan.nodes}
    return [*_launcher(hosts, number, plan.address, plan.port), *script]


def ssh_command(plan: Plan, number: int, variables: Mapping[str, str]) -> list[str]:
    """Returns the command that starts a node's ranks over ssh."""
    there = in_this_folder(node_command(plan, number), variables)
    return [*SSH, "--", plan.nodes[number].host, there]


def in_this_folder(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Returns a command with its environment for the shell of another node, in the folder in which
    this process is. ssh passes one string to the shell there, so every word is quoted."""
    given = [f"{name}={value}" for name, value in variables.items()]
    return f"cd -- {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *given, *command])}"


def stage_options(stage: str | None, *, force: bool, restart: bool) -> list[str]:
    """Returns the options of launch/run.py for one stage, or the whole recipe."""
    return [
        *(["--stage", stage] if stage else []),
        *(["--force"] if force else []),
        *(["--restart"] if restart else []),
    ]


def describe(plan: Plan, variables: Mapping[str, str], command: Sequence[str] | None) -> list[str]:
    """Returns readable lines: the command that is started here, and the command of each node."""
    num_ranks = sum(node.slots for node in plan.nodes)
    where = f"{plan.address}:{plan.port}" if plan.address else "the first node of SLURM's list"
    lines = [
        f"{counted(len(plan.nodes), 'node')}, {counted(num_ranks, 'rank')}, meeting at"
        f" {where}, started by {plan.launcher}"
    ]
    if command is not None:
        lines += ["", "here:", f"  {shlex.join(command)}"]
    lines += [
        "",
        "environment of all ranks:",
        *(f"  {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]
    for number, node in enumerate(plan.nodes):
        ranks = plan.ranks_of(number)
        shown = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        there = (
            [sys.executable, "-u", str(RUN_SCRIPT), *plan.arguments]
            if plan.launcher in ("openmpi", "slurm")
            else node_command(plan, number)
        )
        lines += ["", f"node {number}, {node.host}: {shown}, in {Path.cwd()}"]
        lines += [f"  {shlex.join(there)}"]
    return lines
