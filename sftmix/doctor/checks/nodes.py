"""The nodes of a hostfile, over ssh: each runs its own quick doctor, and differences are
reported."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from sftmix.cluster.exports import wanted
from sftmix.cluster.hostfile import Node, is_host_name
from sftmix.cluster.launch_commands import in_this_folder
from sftmix.doctor.findings import Finding, examine
from sftmix.errors import counted

ITEM = "nodes"
MAX_SKEW_SECONDS = 1.0
CONNECT_SECONDS = 10
NODE_SECONDS = 180.0
SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")


def check_nodes(nodes: list[Node], here: Mapping[str, Any], arguments: list[str]) -> list[Finding]:
    """Examines every node. here: the report of this machine, for comparison. arguments: of the
    doctor there."""
    if shutil.which("ssh") is None:
        left_out = counted(len(nodes), "node was", "nodes were")
        found = (
            f"there is no ssh on this machine, so {left_out} not looked at; `deepspeed --hostfile`"
            " needs it too."
        )
        return [
            Finding(
                ITEM, "bad", found, "Install an ssh client, or run `sftmix doctor` on each node."
            )
        ]

    def look(node: Node) -> list[Finding]:
        return examine(f"node {node.host}", lambda: check_node(node, here, arguments))

    with ThreadPoolExecutor(min(16, len(nodes))) as pool:
        return [finding for findings in pool.map(look, nodes) for finding in findings]


def check_node(node: Node, here: Mapping[str, Any], arguments: list[str]) -> list[Finding]:
    """Returns the problems and differences of a node, or one finding that it is well."""
    item = f"node {node.host}"
    skew, problem = measure_skew(
        lambda: on_node(node.host, ["date", "+%s.%N"], CONNECT_SECONDS + 10.0)
    )
    if problem is not None:
        remedy = f"Try: {shlex.join([*SSH, '--', node.host, 'true'])}"
        return [Finding(item, "bad", f"cannot be reached: {problem}.", remedy)]
    findings = []
    if skew is None:
        findings.append(Finding(item, "skipped", "its clock cannot be read by `date +%s.%N`."))
    elif abs(skew) > MAX_SKEW_SECONDS:
        found = (
            f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}; expected at most"
            f" {MAX_SKEW_SECONDS:.0f} s."
        )
        findings.append(
            Finding(
                item, "bad", found, "Synchronise the clocks (chrony, ntpd).", {"skew_seconds": skew}
            )
        )
    try:
        done = on_node(node.host, remote_command(arguments), NODE_SECONDS)
    except subprocess.TimeoutExpired:
        remedy = "Run `sftmix doctor --quick` there by hand."
        return [
            *findings,
            Finding(item, "bad", f"its doctor gave no report within {NODE_SECONDS:.0f} s.", remedy),
        ]
    report = parse_report(done.stdout)
    if report is None:
        last = " ".join((done.stderr or done.stdout).split())[-300:] or "nothing was printed"
        remedy = f"The same Python ({sys.executable}) and folder ({Path.cwd()}) must be there."
        return [
            *findings,
            Finding(
                item,
                "bad",
                f"its doctor gave no report (exit code {done.returncode}): {last}.",
                remedy,
            ),
        ]
    findings += compare(item, here, report)
    troubles = [f for f in report["findings"] if f["verdict"] in ("bad", "warning")]
    findings += [
        Finding(item, f["verdict"], f"{f['item']}: {f['found']}", f["remedy"]) for f in troubles
    ]
    if not any(finding.verdict in ("bad", "warning") for finding in findings):
        shown = f", clock {skew:+.2f} s" if skew is not None else ""
        findings.insert(
            0,
            Finding(
                item,
                "ok",
                f"{counted(node.slots, 'slot')}; versions, code, config and data as here{shown}.",
            ),
        )
    return findings


def measure_skew(
    ask: Callable[[], subprocess.CompletedProcess[str]],
) -> tuple[float | None, str | None]:
    """Returns by how many seconds a node's clock is ahead (0 within the duration of the call; None
    if it returned no time), and why it cannot be reached (None if it can)."""
    before = time.time()
    try:
        done = ask()
    except subprocess.TimeoutExpired as error:
        return None, f"no answer within {error.timeout:.0f} s"
    after = time.time()
    if done.returncode:
        return None, " ".join(done.stderr.split())[-300:] or f"ssh ended with {done.returncode}"
    try:
        there = float(done.stdout.split()[-1])  # the shell there may print a greeting first
    except (ValueError, IndexError):
        return None, None
    return (there - after if there > after else there - before if there < before else 0.0), None


def on_node(
    host: str, command: list[str], limit_seconds: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command on a node. ssh passes one string to the shell there, so every word is
    quoted."""
    assert is_host_name(host), f"{host!r} was not validated"
    return subprocess.run(
        [*SSH, "--", host, shlex.join(command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_seconds,
        check=False,
    )


def remote_command(arguments: list[str]) -> list[str]:
    """Returns the command for a node: the same Python in the same folder, as with DeepSpeed's
    launchers."""
    doctor = [sys.executable, "-m", "sftmix.cli", "doctor", *arguments]
    return ["sh", "-c", in_this_folder(doctor, wanted(os.environ))]


def parse_report(text: str) -> dict[str, Any] | None:
    """Finds the report in the output of a node: the last line that is a JSON object with
    findings."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError):
            report = json.loads(line)
            if isinstance(report, dict) and {"findings", "identity"} <= report.keys():
                return report
    return None


WORDS = {
    "versions": (
        "versions",
        "Install the same on all nodes; ranks of unlike versions hang or compute other numbers.",
    ),
    "commit": ("commit", "Check out the same commit on all nodes."),
    "code": ("code", "Copy the same files of sftmix to all nodes."),
    "config": ("config", "Use the same config on all nodes."),
    "data": ("data", "Copy the same files to all nodes."),
    "model": ("model files", "Copy the same files to all nodes."),
}


def compare(item: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> list[Finding]:
    """Returns a finding for everything that affects results and differs between a node and this
    machine."""
    findings = []
    for name, (word, remedy) in WORDS.items():
        own, other = _flat(here["identity"].get(name)), _flat(there["identity"].get(name))
        differing = [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]
        if (
            name == "commit"
            and differing
            and here["identity"].get("code") == there["identity"].get("code")
        ):
            continue  # a copy without .git
        shown = "; ".join(
            f"{key + ' ' if key else ''}{_short(other.get(key))} there, {_short(own.get(key))} here"
            for key in differing[:5]
        )
        if differing:
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            findings.append(Finding(item, "bad", f"other {word}: {shown}{more}.", remedy))
    if there.get("sees_run_folder") is False:
        found = (
            "it does not see the file that was put beside the run folder here: the folder is not"
            " shared."
        )
        remedy = (
            "Put run.dir on storage that all nodes share, under the same path, or start on the same"
            " nodes again."
        )
        findings.append(Finding(item, "warning", found, remedy))
    return findings


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            name: leaf
            for key, part in value.items()
            for name, leaf in _flat(part, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:24] + "..."
