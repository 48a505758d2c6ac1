"""Provenance of an output: fingerprints of settings, package versions, and the commit of the
code."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("sftmix", "torch", "deepspeed", "transformers", "datasets", "triton", "peft")


def fingerprint(content: Any) -> str:
    """Returns the SHA-256 (hex) of any JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, prefix: str = ""
) -> list[str]:
    """Returns a line for each value that differs: `a.b: 1 before, 2 now`. Values are compared as
    JSON, the form in which manifests keep them. prefix: of the names, as in `a.`."""
    before, now = (json.loads(json.dumps(each, default=str)) for each in (before, now))
    lines = []
    for key in sorted({*before, *now}, key=str):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, prefix=f"{prefix}{key}.")
        elif json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
            lines.append(f"{prefix}{key}: {_shown(old)} before, {_shown(new)} now")
    return lines


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if value is not None else "nothing"
    return text if len(text) <= 100 else text[:100] + "..."


def versions() -> dict[str, str]:
    """Returns the installed versions of the packages that affect results."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def as_text(packages: Mapping[str, str]) -> str:
    """Returns versions of packages in one line."""
    return ", ".join(f"{name} {version}" for name, version in packages.items())


@cache
def processor() -> str:
    """Returns the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def commit() -> str | None:
    """Returns the git commit of this checkout with `+changes` if there are uncommitted changes;
    None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    # without tags and with all its digits, this describes the commit by its hash alone
    describe = ("describe", "--always", "--exclude=*", "--abbrev=64", "--dirty=+changes")
    try:
        return subprocess.run(
            ["git", "-C", str(root), *describe], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
