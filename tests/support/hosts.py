"""Hosts on one machine, for tests of runs over several: each has its own network, process table,
host name and mounts, and an sshd.

    with hosts(2, folder, private=run_folder) as nodes:  # node 1 sees an empty disk at run_folder
        nodes[0].deepspeed("launch/run.py", CONFIG)          # `deepspeed --hostfile` over both
        nodes[1].unplug()

A switch (a bridge in a namespace of its own) joins the nodes; nothing is made in the machine's own
network. A node is its first process: when that ends the kernel ends all others in it and takes its
network, cables and mounts away, and it ends when the test's process does, however that dies. So
there is nothing to remove afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

TOGETHER = ("setpriv", "--pdeathsig", "KILL")  # what the test starts does not outlive it
TOOLS = ("setpriv", "unshare", "nsenter", "ip", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
INTERFACE = "eth0"
PATIENCE = 300.0  # seconds until what does not end counts as hanging
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


@dataclass(frozen=True)
class Node:
    """One host. pid: of its first process, as the machine sees it."""

    name: str
    address: str
    pid: int
    switch: int
    folder: Path

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a command on this host, in the repository; the test reads its output."""
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        own = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DS_ENV_FILE": str(self.folder / "environment"),
        }
        return subprocess.Popen(
            [*TOGETHER, "nsenter", "--target", str(self.pid), "--all", f"--wdns={ROOT}", *command],
            env={**inherited, **ENVIRONMENT, **own, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(
        self, command: list[str], *, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end, and returns it with its output. A failing one
        fails the test."""
        return finish(self.start(command, **environment), check=check)

    def start_deepspeed(
        self, *arguments: str, num_nodes: int = -1, fault: str = ""
    ) -> subprocess.Popen[str]:
        """Starts `deepspeed --hostfile` over all hosts, or the first `num_nodes`, from this one.
        `fault`: see sftmix/storage/faults.py."""
        exported = {
            **ENVIRONMENT,
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "SFTMIX_FAULT": fault,
            "SFTMIX_FAULT_SECONDS": f"{PATIENCE:g}",
        }
        (self.folder / "environment").write_text(
            "".join(f"{name}={value}\n" for name, value in exported.items() if value)
        )
        options = [
            "--hostfile",
            str(self.folder / "hostfile"),
            *(["--num_nodes", str(num_nodes)] if num_nodes > 0 else []),
        ]
        return self.start([sys.executable, "-m", "deepspeed.launcher.runner", *options, *arguments])

    def deepspeed(
        self, *arguments: str, check: bool = True, **options
    ) -> subprocess.CompletedProcess[str]:
        """Runs the same to its end."""
        return finish(self.start_deepspeed(*arguments, **options), check=check)

    def unplug(self) -> None:
        """Takes the host's interface down: nothing that is sent comes, and nobody is told."""
        self._in_network("ip", "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        """Takes it up again."""
        self._in_network("ip", "link", "set", INTERFACE, "up")

    def processes(self) -> dict[int, str]:
        """Returns pid -> command line of all that runs on this host but its first process, sshd,
        and what is unwaited for."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                same = (path / "ns" / "pid").readlink() == Path(
                    f"/proc/{self.pid}/ns/pid"
                ).readlink()
                command = (
                    (path / "cmdline")
                    .read_bytes()
                    .replace(b"\0", b" ")
                    .decode(errors="replace")
                    .strip()
                )
                if (
                    same
                    and int(path.name) != self.pid
                    and command
                    and not command.startswith(("sshd:", "/usr/sbin/sshd"))
                ):
                    found[int(path.name)] = command
        return found

    def path(self, path: Path) -> Path:
        """Returns where the test finds what this host calls `path`."""
        return Path(f"/proc/{self.pid}/root{path}")

    def _in_network(self, *command: str) -> None:
        subprocess.run(["nsenter", "--target", str(self.pid), "--net", *command], check=True)


def finish(
    process: subprocess.Popen[str], *, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Waits for a started command; returns it with its output. One that does not end is killed and
    fails the test."""
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(
            f"{process.args} has not ended in {PATIENCE:g} s:\n{output[-4000:]}"
        ) from None
    assert not check or process.returncode == 0, (
        f"{process.args}: exit code {process.returncode}\n{output[-5000:]}"
    )
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


def wait_for(condition, what: str) -> None:
    """Waits until `condition()` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {PATIENCE:g} s"
        time.sleep(0.05)


@functools.cache
def why_not() -> str | None:
    """Returns why there can be no hosts here, None where there can."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2, openssh-server, pdsh)"
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    probe = (
        "mount -t tmpfs tmpfs /run && ip link add probe type bridge && ip link add one type veth"
        " peer name two"
    )
    done = subprocess.run(
        [*_unshare(), "sh", "-c", probe], capture_output=True, text=True, check=False
    )
    return (
        f"namespaces, mounts or bridges are not allowed here: {done.stderr.strip()[:200]}"
        if done.returncode
        else None
    )


@contextlib.contextmanager
def hosts(
    number: int, folder: Path, *, slots: int = 1, private: Path | None = None
) -> Iterator[list[Node]]:
    """Yields hosts that reach each other by ssh. folder: for keys, settings and logs, seen by all.
    slots: ranks on each. private: a folder at which every host but the first has an empty disk of
    its own."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = [f"10.77.0.{1 + index}" for index in range(number)]
    _write_settings(folder, addresses, slots)
    with contextlib.ExitStack() as held:
        bridge = (
            "ip link add switch0 type bridge && ip link set switch0 up && echo ready && exec sleep"
            " infinity"
        )
        switch, nodes = held.enter_context(_first_process(["sh", "-c", bridge])), []
        for index, address in enumerate(addresses):
            disk = f"mount -t tmpfs tmpfs '{private}' && " if private is not None and index else ""
            if private is not None:
                private.mkdir(parents=True, exist_ok=True)
            script = (
                f"hostname node{index} && mount --bind '{folder}/hosts' /etc/hosts && ip link set"
                f" lo up && mount -t tmpfs tmpfs /run && mkdir /run/sshd && {disk}{{ /usr/sbin/sshd"
                f" -D -f '{folder}/sshd_config' -E '{folder}/sshd_{index}.log' & echo ready;"
                " wait; }"
            )
            pid = held.enter_context(_first_process(["bash", "-c", script]))
            _connect(switch, index, pid, address)
            nodes.append(Node(f"node{index}", address, pid, switch, folder))
        for node in nodes:
            wait_for(
                lambda node=node: node.run(["ssh", node.name, "true"], check=False).returncode == 0,
                f"ssh to {node.name}",
            )
        yield nodes


def _unshare() -> list[str]:
    return [
        "unshare",
        "--net",
        "--uts",
        "--ipc",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]


@contextlib.contextmanager
def _first_process(command: list[str]) -> Iterator[int]:
    """Yields the pid of a command in new namespaces, once it has said that it is ready."""
    process = subprocess.Popen(
        [*TOGETHER, *_unshare(), *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd="/",
        start_new_session=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n", (
            f"{command} did not start"
        )
        yield int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _connect(switch: int, index: int, pid: int, address: str) -> None:
    """Puts a cable between the switch and a host, whose end is called the same in all of them."""
    port = f"port{index}"
    at_switch, at_host = (["nsenter", "--target", str(target), "--net"] for target in (switch, pid))
    for command in (
        [
            *at_switch,
            "ip",
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "name",
            INTERFACE,
            "netns",
            str(pid),
        ],
        [*at_switch, "ip", "link", "set", port, "master", "switch0", "up"],
        [*at_host, "ip", "address", "add", f"{address}/24", "dev", INTERFACE],
        [*at_host, "ip", "link", "set", INTERFACE, "up"],
    ):
        subprocess.run(command, check=True)


def _write_settings(folder: Path, addresses: list[str], slots: int) -> None:
    """Writes what ssh, sshd and deepspeed need, all of it below `folder`: nobody's own settings are
    read."""
    key, host_key = folder / "key", folder / "host_key"
    for path in (key, host_key):
        if not path.exists():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True
            )
    (folder / "sshd_config").write_text(
        f"HostKey {host_key}\nAuthorizedKeysFile {key}.pub\nPidFile none\nUsePAM no\nStrictModes"
        " no\nPermitRootLogin yes\nPasswordAuthentication no\n"
    )
    # ServerAlive: ssh to a host that was cut off would wait for hours, and pdsh and deepspeed with
    # it.
    settings = (
        f"IdentityFile {key}\nIdentitiesOnly yes\nStrictHostKeyChecking no\nUserKnownHostsFile"
        " /dev/null\nLogLevel ERROR\nBatchMode yes\nServerAliveInterval 2\nServerAliveCountMax"
        " 3\nConnectTimeout 10\n"
    )
    (folder / "hosts").write_text(
        "127.0.0.1 localhost\n"
        + "".join(f"{address} node{index}\n" for index, address in enumerate(addresses))
    )
    names = "".join(
        f"Host node{index}\n  HostName {address}\n" for index, address in enumerate(addresses)
    )
    (folder / "ssh_config").write_text(settings + names)
    ssh = folder / "ssh"
    ssh.write_text(f"#!/bin/sh\nexec {shutil.which('ssh')} -F '{folder}/ssh_config' \"$@\"\n")
    ssh.chmod(0o755)
    (folder / "hostfile").write_text(
        "".join(f"node{index} slots={slots}\n" for index in range(len(addresses)))
    )
