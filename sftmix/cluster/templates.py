"""Files for batch systems, filled in from `launch/templates/`: every value is validated, and
arguments are quoted."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from sftmix.cluster.launch_commands import stage_options
from sftmix.config.reader import load_config
from sftmix.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).resolve().parent / "launch" / "templates"
FILES = {
    "slurm": "slurm.sh",
    "kubernetes": "kubernetes.yaml",
    "skypilot": "skypilot.yaml",
    "pdsh": "pdsh.sh",
}


@dataclass(frozen=True)
class Value:
    """pattern: of the whole value. meaning: with an example. default: None if it is required."""

    pattern: str
    meaning: str
    default: str | None = None


_COUNT = r"[1-9]\d{0,3}"
_PATH = r"/[A-Za-z0-9@+=:,./_-]*"
# of a Kubernetes service: a pod's name appends its index
_NAME = r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}"
_COMMON = {
    "name": Value(_NAME, "name of the job, small letters, digits and -", "sftmix"),
    "nodes": Value(_COUNT, "number of nodes"),
    "gpus": Value(_COUNT, "GPUs of each node, which is ranks"),
}
_PLACE = {
    "folder": Value(
        _PATH,
        "where the command runs, on all nodes: relative paths of the config begin there",
        str(Path.cwd()),
    ),
    "python": Value(_PATH, "the Python with sftmix, on all nodes", sys.executable),
}
VALUES: dict[str, dict[str, Value]] = {
    "slurm": {
        **_COMMON,
        **_PLACE,
        "time": Value(r"(\d{1,3}-)?\d{1,4}(:[0-5]\d){0,2}", "time limit, for example 24:00:00"),
        "cpus": Value(_COUNT, "cores for each rank", "8"),
        "warning": Value(
            _COUNT,
            "seconds before the time limit at which the run is asked to save and stop",
            "600",
        ),
        "partition": Value(_WORD, "SLURM partition", ""),
        "account": Value(_WORD, "SLURM account", ""),
        "qos": Value(_WORD, "SLURM quality of service", ""),
    },
    "kubernetes": {
        **_COMMON,
        **_PLACE,
        "image": Value(r"[a-z0-9][A-Za-z0-9._:/@-]{0,250}", "container image with sftmix"),
        "claim": Value(_NAME, "PersistentVolumeClaim, ReadWriteMany"),
        "mount": Value(_PATH, "where the claim is mounted", "/shared"),
        "warning": Value(_COUNT, "seconds that a pod has to save when it is taken away", "600"),
        "retries": Value(
            _COUNT,
            "pods that may fail before the job does; a failure of the run counts once for each"
            " node",
            "6",
        ),
    },
    "skypilot": {
        **_COMMON,
        "accelerator": Value(_WORD, "SkyPilot's name of the GPU, for example H100"),
    },
    "pdsh": {**_PLACE, "hostfile": Value(_PATH, "the hostfile, on the first node")},
}


def print_template(options: argparse.Namespace) -> int:
    """Prints the file. Returns 0. Raises ConfigError for options that the template does not have,
    and for missing or wrong values."""
    for name in ("hostfile", "node_rank", "master_addr", "master_port"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} does nothing with --template {options.template}. Leave"
                " it out; see --set."
            )
    given, overrides = _pairs(options)
    load_config(options.config, overrides)
    stage = stage_options(options.stage, force=options.force, restart=options.restart)
    arguments = [options.config, *overrides, *stage]
    print(
        render(options.template, given, arguments, doctor_arguments=[options.config, *overrides]),
        end="",
    )
    return 0


def _pairs(options: argparse.Namespace) -> tuple[dict[str, str], list[str]]:
    """Returns the values of --set, and the overrides of the config.

    `--set nodes=2 gpus=8` leaves the second pair among the overrides; no config key has the name of
    a template value.
    """
    names = "|".join(VALUES[options.template])
    behind = [text for text in options.overrides if re.match(f"({names})=", text)]
    given: dict[str, str] = {}
    for text in [*options.set, *behind]:
        # any other comma belongs to the value
        for pair in re.split(rf",\s*(?=(?:{names})=|$)", text):
            name, sign, value = pair.partition("=")
            if pair and not sign:
                raise ConfigError(f"--set {text[:80]!r}: expected NAME=VALUE, for example nodes=2.")
            if pair:
                given[name] = value
    return given, [text for text in options.overrides if text not in behind]


def render(
    template: str,
    given: Mapping[str, str],
    arguments: Sequence[str],
    *,
    doctor_arguments: Sequence[str] = (),
) -> str:
    """Returns the file. arguments: of `sftmix launch`, the config first. Raises ConfigError for
    values that are missing or wrong."""
    known = VALUES[template]
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--set {name[:80]}: {template} has no such value. "
                + did_you_mean(name, known, f"It has {', '.join(known)}.")
            )
    values = {name: given.get(name, value.default) for name, value in known.items()}
    missing = [
        f"--set {name}=... ({known[name].meaning})"
        for name, value in values.items()
        if value is None
    ]
    if missing:
        raise ConfigError(f"--template {template} also needs {', '.join(missing)}.")
    filled = {name: value for name, value in values.items() if value is not None}
    for name, value in filled.items():
        if value != known[name].default and re.fullmatch(known[name].pattern, value) is None:
            raise ConfigError(
                f"--set {name}={value[:80]!r} cannot be: {known[name].meaning}, matching"
                f" {known[name].pattern}. Correct it."
            )
    for argument in arguments:
        if not argument.isprintable():
            raise ConfigError(
                f"{argument[:80]!r} holds a line break or another letter that cannot be printed."
                " Write it into the config file."
            )
    for name in ("folder", "python"):  # defaults, which were not validated
        if name in filled:
            filled[name] = shlex.quote(filled[name])
    filled |= {
        "arguments": shlex.join(arguments),
        "doctor_arguments": shlex.join(doctor_arguments),
        "options": "".join(
            f"#SBATCH --{name}={filled[name]}\n"
            for name in ("partition", "account", "qos")
            if filled.get(name)
        ),
    }
    if template == "kubernetes":
        hosts = (
            f"    {filled['name']}-{number}.{filled['name']} slots={filled['gpus']}"
            for number in range(int(filled["nodes"]))
        )
        filled["hosts"] = "\n".join(hosts)
    return Template((FOLDER / FILES[template]).read_text(encoding="utf-8")).substitute(filled)
