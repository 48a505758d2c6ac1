"""Versions that affect results, compared with known bad releases and with setup.py; and everything
that must be equal on all nodes: versions, code, config, data, model files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from sftmix.config.schema import Config
from sftmix.doctor.findings import Finding
from sftmix.storage.files import sha256_of_file
from sftmix.storage.provenance import commit, fingerprint, versions

ITEM = "versions"


# package, first and last release (both included), what is wrong with them, and where that is told
KNOWN_BAD = (
    (
        "deepspeed",
        "0.17.6",
        "0.18.2",
        "wrong gradients under ZeRO-2",
        "https://github.com/deepspeedai/DeepSpeed/issues/7718",
    ),
    (
        "deepspeed",
        "0.18.3",
        "0.19.3",
        "wrong gradients under ZeRO-2 in bf16 where a module runs twice in a step",
        "https://github.com/deepspeedai/DeepSpeed/issues/8224",
    ),
    (
        "transformers",
        "5.1.0",
        "5.1.0",
        "does not work with DeepSpeed",
        "https://github.com/huggingface/transformers/issues/43780",
    ),
    (
        "transformers",
        "5.4.0",
        "5.4.0",
        "weights of Qwen3.5 are not loaded under ZeRO-3",
        "https://github.com/huggingface/transformers/issues/45313",
    ),
)

# The oldest driver of each major version of CUDA
# (https://docs.nvidia.com/deploy/cuda-compatibility/).
OLDEST_DRIVER = {"12": "525.60.13", "13": "580.65.06"}


def installed() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide a run's numbers."""
    return {"python": platform.python_version(), **versions()}


def check_versions() -> list[Finding]:
    """Reports what is installed, known bad releases, and versions outside the ranges of
    setup.py."""
    found = installed()
    problems = [
        *known_bad(found),
        *outside_ranges(found, requirements()),
        *(
            Finding(ITEM, "bad", f"{name} is not installed.", f"Install it: pip install {name}")
            for name in sorted({"torch", "deepspeed", "transformers", "datasets"} - set(found))
        ),
    ]
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    return problems or [Finding(ITEM, "ok", f"{shown}: none known to be wrong.", facts=dict(found))]


def known_bad(found: Mapping[str, str]) -> list[Finding]:
    """Returns a finding for every row of KNOWN_BAD that is installed."""
    return [
        Finding(
            ITEM,
            "bad",
            f"{package} {found[package]}: {reason} ({link}; {first} to {last}).",
            f"Install one outside of these: pip install '{package}>{last}'.",
        )
        for package, first, last, reason, link in KNOWN_BAD
        if package in found and Version(first) <= _release(found[package]) <= Version(last)
    ]


def requirements() -> list[str]:
    """Returns the requirements of the installed package; nothing if sftmix is not installed."""
    try:
        return importlib.metadata.requires("sftmix") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def outside_ranges(found: Mapping[str, str], required: list[str]) -> list[Finding]:
    """Returns a finding for every package of `found` whose version a requirement does not allow."""
    return [
        Finding(
            ITEM,
            "bad",
            f"{requirement.name} {found[requirement.name]} is outside of what setup.py asks for:"
            f" {requirement.specifier}.",
            f"Install one inside: pip install '{requirement.name}{requirement.specifier}'.",
        )
        for requirement in map(Requirement, required)
        if requirement.name in found
        and not requirement.specifier.contains(_release(found[requirement.name]), prereleases=True)
    ]


def check_driver(cuda: str | None, driver: str | None) -> list[Finding]:
    """cuda: the version that torch was built for, None for a CPU build. driver: of the GPUs, None
    without GPUs."""
    item = "CUDA"
    if cuda is None:
        if driver is None:
            return [Finding(item, "skipped", "torch is a CPU build, and there is no GPU here.")]
        return [
            Finding(
                item,
                "bad",
                f"there are GPUs (driver {driver}), but torch is a CPU build.",
                "Install torch for CUDA: pytorch.org.",
            )
        ]
    if driver is None:
        return [
            Finding(
                item,
                "warning",
                f"torch is built for CUDA {cuda}, but nvidia-smi shows no GPU.",
                "Runs use the CPU.",
            )
        ]
    oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
    facts = {"cuda": cuda, "driver": driver}
    if oldest is not None and _release(driver) < Version(oldest):
        remedy = "Renew the driver, or install torch for an older CUDA."
        return [
            Finding(
                item,
                "bad",
                f"driver {driver} is too old for CUDA {cuda}, which torch is built for: {oldest} at"
                " least.",
                remedy,
                facts,
            )
        ]
    return [Finding(item, "ok", f"torch for CUDA {cuda}, driver {driver}.", facts=facts)]


def _release(version: str) -> Version:
    """Returns a version without its local part (`+cpu`), so that it compares as the release it was
    built from."""
    return Version(version.split("+")[0])


WHOLE_BYTES = 2**28  # larger files are compared by size, beginning and end
END_BYTES = 2**24


def identity(config: Config | None) -> dict[str, Any]:
    """Returns it as JSON values, so that differences can be named."""
    found: dict[str, Any] = {"versions": installed(), "commit": commit(), "code": code_digest()}
    if config is not None:
        found["config"] = config.model_dump(mode="json")
        found["data"] = {
            source.path: digest_of(Path(source.path)) for source in config.data.all_sources
        }
        found["model"] = {
            model.path: digest_of(Path(model.path))
            for model in config.models.values()
            if model.path is not None
        }
    return found


def code_digest() -> str:
    """Returns a hash of the package's files, which includes uncommitted edits."""
    root = Path(__file__).resolve().parents[2]
    # kernels/ and launch/ are links
    folders = [Path(folder) for folder, _, _ in os.walk(root, followlinks=True)]
    files = [path for folder in folders for path in folder.glob("*.py")]
    return fingerprint({path.relative_to(root).as_posix(): sha256_of_file(path) for path in files})


def digest_of(path: Path) -> str | None:
    """Returns a hash of a file, or of all files of a folder; None if it does not exist here, such
    as a name on the Hub."""
    if path.is_dir():
        return fingerprint(
            {
                str(file.relative_to(path)): _digest_of_file(file)
                for file in sorted(path.rglob("*"))
                if file.is_file()
            }
        )
    return _digest_of_file(path) if path.is_file() else None


def _digest_of_file(path: Path) -> str:
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return sha256_of_file(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(END_BYTES))
        file.seek(-END_BYTES, 2)
        digest.update(file.read())
    return digest.hexdigest()
