"""How a score table was made: models, checkpoints, data and versions, kept in the files' schema."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from sftmix.confidence.table_files import read_schema
from sftmix.errors import ArtifactError

FORMAT = 1  # of the two tables
KEY = b"sftmix"
_KINDS = {
    "format": int,
    "mode": str,
    "models": list,
    "checkpoints": list,
    "fingerprints": dict,
    "dataset": list,
    "versions": dict,
}


@dataclass(frozen=True)
class ScoreMetadata:
    """mode: checkpoints, live, online or models. models: the models that scored (path, revision,
    architecture). checkpoints: steps of the reference run, or indices of the models. fingerprints:
    tokenizer, template, mask_policy, max_length, dtype, data, and where they matter date and images
    (the processor). dataset: names of the sources. versions, commit: of the packages and the code
    that scored."""

    mode: str
    models: list[dict[str, Any]]
    checkpoints: list[int]
    fingerprints: dict[str, str | int]
    dataset: list[str]
    versions: dict[str, str]
    commit: str | None = None
    format: int = FORMAT

    def to_schema(self, schema: pa.Schema) -> pa.Schema:
        """Returns the schema with this object in its metadata."""
        return schema.with_metadata({KEY: json.dumps(asdict(self), default=str).encode()})

    @classmethod
    def of_file(cls, path: Path) -> ScoreMetadata | None:
        """Reads the metadata of a Parquet file; None if sftmix did not write it. Raises
        ArtifactError."""
        content = (read_schema(path).metadata or {}).get(KEY)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError as error:
            raise ArtifactError(
                f"{path}: its sftmix metadata is not JSON ({error}). Get the table again."
            ) from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            version = found.get("format") if isinstance(found, dict) else found
            raise ArtifactError(
                f"{path}: the format of its sftmix metadata is {version!r}; this version reads"
                f" {FORMAT}. Update sftmix."
            )
        names = {field.name for field in fields(cls)}
        wrong = (
            sorted(names ^ set(found))
            or [name for name, kind in _KINDS.items() if not isinstance(found[name], kind)]
            or [
                name
                for name, kind in (("checkpoints", int), ("models", dict))
                if not found[name] or not all(isinstance(item, kind) for item in found[name])
            ]
        )
        if wrong:
            raise ArtifactError(
                f"{path}: in its sftmix metadata, {', '.join(wrong)} is missing, unknown, empty or"
                " of a wrong type. Get it again."
            )
        return cls(**found)
