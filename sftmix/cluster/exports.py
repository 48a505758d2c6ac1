"""Which environment variables the ranks on other nodes receive, quoted so that they arrive
unchanged.

DeepSpeed sends variables that begin with PYTHON, UCX, MV2, MLFLOW and, where it sees CUDA, NCCL,
and the lines of `.deepspeed_env`. It puts a value with unusual characters between double quotes but
does not escape what is special inside them: a shell on the node would run `$(...)`, and mpirun and
srun, which use no shell, would keep the quotes. So each value is quoted for the launcher that reads
it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from sftmix.cluster.environment import CARRIED
from sftmix.errors import ConfigError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]  # the folder that holds `sftmix`
PREFIXES = (
    "SFTMIX_",
    "NCCL_",
    "GLOO_",
    "UCX_",
    "FI_",
    "HF_",
    "TORCH_",
    "PYTORCH_",
    "TRITON_",
    "PYTHON",
    "CUDA_DEVICE_ORDER",
)
NAMES = frozenset({"OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"})
# deepspeed/launcher/runner.py, and its CUDA accelerator
SENT_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
ENV_FILE = "DS_ENV_FILE"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[\w@%+=:,./-]*")  # values that DeepSpeed does not quote
# must not appear on a command line, which every user of the node can read
_SECRET = re.compile(r"(TOKEN|SECRET|PASSWORD|KEY)$")


def wanted(environment: Mapping[str, str], package_root: Path = PACKAGE_ROOT) -> dict[str, str]:
    """Returns the variables for ranks on other nodes, by name. package_root: the folder that holds
    `sftmix`.

    The lines of the user's `.deepspeed_env` (in the home folder, then here, as DeepSpeed reads
    them) override them.
    """
    found = {
        name: value
        for name, value in environment.items()
        if (name.startswith(PREFIXES) or name in NAMES) and not _SECRET.search(name)
    }
    found["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(package_root), found.get("PYTHONPATH", "")])
    )
    name = environment.get(ENV_FILE, ".deepspeed_env")
    for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)):
        if path.is_file():
            found |= _read(path)
    for name, value in found.items():
        if "\n" in value or "\r" in value:
            raise ConfigError(
                f"{name} holds a line break, which no launcher takes to other nodes. Unset it, or"
                " write it in one line."
            )
    return dict(sorted(found.items()))


def _read(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        name, sign, value = line.partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not sign or _NAME.fullmatch(name.strip()) is None:
            raise ConfigError(
                f"{path}:{number}: found {line[:80]!r}, expected NAME=VALUE. Correct the line."
            )
        found[name.strip()] = value.strip()
    return found


def env_file_text(variables: Mapping[str, str], launcher: str) -> str:
    """Returns the content of a `.deepspeed_env` that gives the ranks these values. Raises
    ConfigError for a value that the launcher cannot transport: mpirun would receive DeepSpeed's
    quotes as part of it."""
    lines = []
    for name, value in variables.items():
        is_plain = _PLAIN.fullmatch(value) is not None
        if launcher == "openmpi" and not is_plain:
            raise ConfigError(
                f"{name} is {value[:80]!r}: DeepSpeed gives mpirun such a value with quotes around"
                " it. Use letters, digits and @%+=:,./-_ only, unset it, or take another"
                " --launcher."
            )
        # for the double quotes that DeepSpeed adds, so that the shell on the node sees the value
        escaped = value if is_plain else re.sub(r'([\\"$`])', r"\\\1", value)
        lines.append(f"{name}={for_pdsh(escaped) if launcher == 'pdsh' else value}\n")
    return "".join(lines)


def for_pdsh(text: str) -> str:
    """Escapes the text for pdsh, which replaces %h, %u and %n."""
    return text.replace("%", "%%")


def for_srun(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for srun, which passes on all of it. A variable that DeepSpeed would
    repeat on srun's command line, where a comma ends a value, gets another name;
    `environment.translate` restores it."""
    own = {}
    for name, value in variables.items():
        is_garbled = name.startswith(SENT_BY_DEEPSPEED) and (
            "," in value or _PLAIN.fullmatch(value) is None
        )
        if is_garbled and name.startswith("PYTHON"):
            raise ConfigError(
                f"{name} is {value[:80]!r}: DeepSpeed garbles this for srun. Use letters, digits"
                " and @%+=:./-_ only."
            )
        own[CARRIED + name if is_garbled else name] = value
    return own
