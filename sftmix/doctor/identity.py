"""What must be the same on all nodes of a run: versions, code, config, data, model files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sftmix.config.schema import Config
from sftmix.doctor.versions import installed
from sftmix.storage.files import sha256_of_file
from sftmix.storage.provenance import commit, fingerprint

WHOLE_BYTES = 2**28  # a larger file is told by its size, beginning and end
END_BYTES = 2**24


def identity(config: Config | None) -> dict[str, Any]:
    """Returns it as JSON values, so that what differs can be named."""
    found: dict[str, Any] = {"versions": installed(), "commit": commit(), "code": code_digest()}
    if config is not None:
        found["config"] = config.model_dump(mode="json")
        found["data"] = {source.path: digest_of(Path(source.path)) for source in config.data.all_sources}
        models = [config.model, config.reference_model, *config.confidence.models]
        found["model"] = {model.path: digest_of(Path(model.path)) for model in models if model.path is not None}
    return found


def code_digest() -> str:
    """Returns a hash of the package's files, which also tells edits that no commit knows of."""
    root = Path(__file__).resolve().parents[1]
    folders = [Path(folder) for folder, _, _ in os.walk(root, followlinks=True)]  # kernels/ and launch/ are links
    files = [path for folder in folders for path in folder.glob("*.py")]
    return fingerprint({path.relative_to(root).as_posix(): sha256_of_file(path) for path in files})


def digest_of(path: Path) -> str | None:
    """Returns a hash of a file, or of all files of a folder; None for what is not here, such as a name on the Hub."""
    if path.is_dir():
        return fingerprint({str(file.relative_to(path)): _digest_of_file(file) for file in sorted(path.rglob("*")) if file.is_file()})
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
