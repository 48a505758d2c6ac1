"""Ports, the name of this machine, and the interfaces that ranks would use."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sftmix.cluster.environment import DEFAULT_PORT, free_port
from sftmix.doctor.findings import Finding

# Bridges and virtual interfaces of containers, which do not lead to another machine.
VIRTUAL = (
    "lo",
    "docker",
    "veth",
    "br-",
    "virbr",
    "cni",
    "flannel",
    "cali",
    "tunl",
    "dummy",
    "sit",
    "gre",
    "erspan",
    "ip6",
    "ip_vti",
    "kube",
    "nodelocal",
)
NAMES = {"gloo": "GLOO_SOCKET_IFNAME", "NCCL": "NCCL_SOCKET_IFNAME"}
_SIOCGIFADDR = 0x8915  # of <linux/sockios.h>


@dataclass(frozen=True)
class Interface:
    name: str
    address: str | None
    is_up: bool


def check_ports(port: int | None = None) -> list[Finding]:
    """Checks that a free port can be bound, and that the meeting port is free. port: MASTER_PORT by
    default, or 29500."""
    try:
        free = free_port()
    except OSError as error:
        remedy = "Look at the firewall, the limits of open files, and net.ipv4.ip_local_port_range."
        return [Finding("ports", "bad", f"no free port can be had: {error.strerror}.", remedy)]
    named = os.environ.get("MASTER_PORT")
    if port is None and named is not None and not (named.isdecimal() and 0 < int(named) < 65536):
        return [
            Finding(
                "ports",
                "bad",
                f"MASTER_PORT is {named!r}, which is not a port (1 to 65535).",
                "Correct it, or unset it.",
            )
        ]
    wanted = port or int(named or DEFAULT_PORT)
    with socket.socket() as probe:
        # as torch does: a port in TIME_WAIT can be bound
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
            probe.listen()
        except OSError as error:
            is_named = bool(named or port)
            what = "MASTER_PORT" if is_named else "the default port of deepspeed and torchrun"
            found = (
                f"{wanted} ({what}) is not available: {error.strerror}, by {_holder_of(wanted)}."
            )
            remedy = (
                "Name another: --master_port"
                f" {free}{' (sftmix run chooses one itself)' if not is_named else ''}."
            )
            return [
                Finding("ports", "bad" if is_named else "warning", found, remedy, {"port": wanted})
            ]
    return [Finding("ports", "ok", f"{wanted} is free, and so are others.")]


def check_host_name(*, num_nodes: int = 1) -> list[Finding]:
    """Checks the addresses of the names by which ranks find each other."""
    local = _addresses("localhost")
    if not any(address.startswith("127.") or address == "::1" for address in local):
        remedy = "Add `127.0.0.1 localhost` to /etc/hosts."
        return [
            Finding(
                "host name",
                "bad",
                f"localhost resolves to {local or 'nothing'}, not to 127.0.0.1.",
                remedy,
            )
        ]
    name = socket.gethostname()
    own = _addresses(name)
    facts = {"name": name, "addresses": own}
    if not own:
        found = f"{name} does not resolve; ranks that look for this machine by name wait in vain."
        return [
            Finding(
                "host name",
                "bad" if num_nodes > 1 else "warning",
                found,
                f"Add a line for {name} to /etc/hosts.",
                facts,
            )
        ]
    if all(address.startswith("127.") or address == "::1" for address in own):
        found = f"{name} resolves to {', '.join(own)}, this machine alone"
        if num_nodes > 1 and NAMES["gloo"] not in os.environ:
            remedy = (
                f"Name the interface to the other nodes: {NAMES['gloo']}=<interface> in"
                " .deepspeed_env, or fix /etc/hosts."
            )
            return [
                Finding(
                    "host name",
                    "bad",
                    f"{found}: with gloo, the other nodes would wait in vain.",
                    remedy,
                    facts,
                )
            ]
        return [Finding("host name", "ok", f"{found}: enough for one node.", facts=facts)]
    return [Finding("host name", "ok", f"{name} resolves to {', '.join(own)}.", facts=facts)]


def interfaces() -> list[Interface]:
    """Returns the network interfaces of this machine, with their IPv4 addresses."""
    return [Interface(name, _address_of(name), _is_up(name)) for _, name in socket.if_nameindex()]


def check_interfaces(found: list[Interface] | None = None, *, num_nodes: int = 1) -> list[Finding]:
    """Checks which interface gloo and NCCL would use. With several, the choice is arbitrary unless
    one is set."""
    item = "interfaces"
    present = interfaces() if found is None else found
    names = {interface.name for interface in present}
    named = {
        library: os.environ[variable]
        for library, variable in NAMES.items()
        if os.environ.get(variable)
    }
    for library, value in named.items():
        if not _names_one(value, names):
            only = ", ".join(sorted(names))
            return [
                Finding(
                    item,
                    "bad",
                    f"{NAMES[library]}={value}, but {library} finds only {only}.",
                    "Correct it.",
                )
            ]
    usable = [
        i for i in present if i.is_up and i.address is not None and not i.name.startswith(VIRTUAL)
    ]
    facts = {"interfaces": [{"name": i.name, "address": i.address} for i in usable]}
    if named:
        return [
            Finding(
                item,
                "ok",
                f"named by the environment: {', '.join(f'{k} {v}' for k, v in named.items())}.",
                facts=facts,
            )
        ]
    if not usable:
        return [
            Finding(
                item,
                "bad" if num_nodes > 1 else "ok",
                "only the loopback interface is up: enough for one node.",
                facts=facts,
            )
        ]
    own = _addresses(socket.gethostname())
    gloo = next((i.name for i in present if i.address in own), "lo")
    nccl = next((i.name for i in usable if i.name.startswith("ib")), usable[0].name)
    text = ", ".join(f"{i.name} ({i.address})" for i in usable)
    if len(usable) > 1:
        remedy = (
            "Name the one to the other nodes:"
            f" {' '.join(f'{variable}={nccl}' for variable in NAMES.values())} in .deepspeed_env."
        )
        found_text = f"several: {text}; gloo would take {gloo}, NCCL {nccl}."
        if num_nodes > 1:
            return [Finding(item, "warning", found_text, remedy, facts)]
        return [Finding(item, "ok", found_text, f"For several nodes: {remedy}", facts)]
    return [Finding(item, "ok", f"{text}; gloo would take {gloo}, NCCL {nccl}.", facts=facts)]


def _names_one(value: str, names: set[str]) -> bool:
    """Returns whether the value of GLOO_/NCCL_SOCKET_IFNAME matches an interface. It is a list of
    prefixes; `=` means exact names, `^` excludes."""
    wanted = value.lstrip("^=").split(",")
    if value.startswith("^"):
        return any(not name.startswith(tuple(wanted)) for name in names)
    if value.startswith("="):
        return bool(names & set(wanted))
    return any(name.startswith(tuple(wanted)) for name in names)


def _addresses(name: str) -> list[str]:
    with suppress(OSError, UnicodeError):
        return sorted(
            {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        )
    return []


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return socket.inet_ntoa(
                fcntl.ioctl(
                    probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15])
                )[20:24]
            )
        except OSError:
            return None


def _is_up(interface: str) -> bool:
    try:
        return (Path("/sys/class/net") / interface / "operstate").read_text().strip() != "down"
    except OSError:
        return True


def _holder_of(port: int) -> str:
    """Returns who listens on a port, `pid N (command)`, if this user may see it."""
    sockets = {
        inode for table in ("tcp", "tcp6") for inode in _listeners(Path("/proc/net") / table, port)
    }
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):
            for descriptor in folder.iterdir():
                with suppress(OSError):
                    if str(descriptor.readlink()) in sockets:
                        command = (
                            (folder.parent / "cmdline")
                            .read_text(errors="replace")
                            .replace("\0", " ")
                            .strip()
                        )
                        return f"pid {folder.parent.name} ({command[:80]})"
    return "a process that cannot be seen from here"


def _listeners(table: Path, port: int) -> set[str]:
    found: set[str] = set()
    with suppress(OSError):
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rsplit(":", 1)[1], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found
