"""The files of a score table: their paths, and their columns, which are validated on reading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sftmix.errors import ArtifactError, ConfigError
from sftmix.storage.files import looks_local

PERPLEXITY, CONFIDENCE, NOT_FINITE = "perplexity.parquet", "confidence.parquet", "not_finite.jsonl"
# a few MiB in memory, beside the sums, while a table is written
ROWS_PER_GROUP = 1 << 17
UNREADABLE = (pa.ArrowException, OSError)  # a truncated or damaged file, or not Parquet


def locate(source: str, revision: str | None, name: str) -> Path:
    """Returns the path of one of the two files of a table. Raises ArtifactError if it is
    missing."""
    path = Path(source)
    if path.is_file():
        if name != CONFIDENCE:
            raise ArtifactError(
                f"{source} is one file; this needs the folder with {PERPLEXITY} and {CONFIDENCE}."
                " Give the folder."
            )
        return path
    if not path.is_dir() and (looks_local(source) or path.suffix == ".parquet"):
        raise ArtifactError(
            f"{source} does not exist. Give a folder with {CONFIDENCE}, a Parquet file, or a Hub"
            " name (`owner/name`)."
        )
    folder = path if path.is_dir() else download(source, revision, name)
    if not (folder / name).is_file():
        inner = path / "confidence" / name
        hint = (
            f"Give {inner.parent}."
            if inner.is_file()
            else "Give a folder that `sftmix score` or `sftmix scores` wrote."
        )
        raise ArtifactError(f"{source} holds no {name}. {hint}")
    return folder / name


def refuse_existing(to: Path) -> None:
    """Raises ConfigError for a target of `--to` that exists: a user's files are never replaced."""
    if to.exists():
        raise ConfigError(f"--to: {to} exists. Name a new folder.")


def download(name: str, revision: str | None, file: str) -> Path:
    """Downloads one file of a dataset repository on the Hub, if it exists, and returns its folder.
    Nothing is unpickled or executed."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=[file])
        )
    except (
        OSError,
        ValueError,
    ) as error:  # errors of the Hub, no connection, an invalid name
        raise ArtifactError(
            f"{name} is not a local folder, and the Hub does not give a dataset of this name"
            f"{f' at revision {revision}' if revision else ''} ({type(error).__name__}). "
            "Check the name and the connection, or download it and give its path."
        ) from None


def read_schema(path: Path) -> pa.Schema:
    """Returns the schema of a Parquet file. Raises ArtifactError for anything else."""
    try:
        return pq.read_schema(path)
    except UNREADABLE as error:
        raise unreadable(path, error) from None


def read_column(path: Path, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    """Returns one column as strings, float64 or int64. Raises ArtifactError for a missing one,
    another type, and damaged pages."""
    schema = read_schema(path)
    if schema.names.count(name) != 1:
        found = "twice" if name in schema.names else "not"
        raise ArtifactError(
            f"{path}: the column {name!r} is {found} there; it has {', '.join(schema.names)}. Name"
            " one that it has once."
        )
    is_text, is_whole = pa.types.is_string(kind), pa.types.is_integer(kind)
    given = schema.field(name).type
    value_type = given.value_type if pa.types.is_dictionary(given) else given
    fits = (
        value_type in (pa.string(), pa.large_string(), pa.string_view())
        if is_text
        else pa.types.is_integer(given)
        or (not is_whole and (pa.types.is_floating(given) or pa.types.is_decimal(given)))
    )
    if not fits:
        expected = "text" if is_text else "whole numbers" if is_whole else "numbers"
        raise ArtifactError(
            f"{path}: the column {name!r} holds {given}; expected {expected}. Convert it, or name"
            " another column."
        )
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            column = file.read(columns=[name]).column(name).cast(kind, safe=is_text or is_whole)
            num_rows = file.metadata.num_rows
        column.validate(full=True)  # text that is not UTF-8
    except UNREADABLE as error:
        raise unreadable(path, error) from None
    # checksums do not cover page headers, and unknown pages are skipped
    if len(column) != num_rows:
        raise unreadable(path, f"{len(column)} of {num_rows} rows are in the column {name!r}.")
    return column


def unreadable(path: Path, error: Exception | str) -> ArtifactError:
    """Returns the error for a damaged file."""
    return ArtifactError(
        f"{path}: cannot be read as Parquet: {' '.join(str(error).split())} Get the table again."
    )


def string_column(values: Sequence[str] | pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns strings as a column, in pieces: one Arrow array of strings ends at 2 GiB."""
    if isinstance(values, pa.ChunkedArray):
        return values
    parts = [
        pa.array(values[start : start + ROWS_PER_GROUP], pa.string())
        for start in range(0, len(values), ROWS_PER_GROUP)
    ]
    return pa.chunked_array(parts, pa.string())
