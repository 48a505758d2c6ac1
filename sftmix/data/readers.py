"""Read rows of files, each with its place (`file:line`), and check them one by one.

JSON and CSV are parsed here instead of by `datasets`, which silently accepts missing keys, nulls,
mixed types and two objects on a line, and whose errors name no line. Parquet, saved datasets and
the Hub, which carry a schema, are read with `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from sftmix.config.schema import DataSource
from sftmix.errors import DataError, counted
from sftmix.storage.files import looks_local, sha256_of_file
from sftmix.storage.provenance import fingerprint

Row = dict[str, Any]

COMPRESSED = (".gz", ".xz", ".zst")
TEXT_FORMATS = (".json", ".jsonl", ".csv")
MAX_LISTED = 20  # bad rows in one message
# a truncated or damaged file, or another format
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)


class BadRows:
    """Collects the problems of single rows, so that one error reports all of them."""

    def __init__(self) -> None:
        self.count = 0
        self.listed: list[str] = []

    def add(self, place: str, problem: str) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            self.listed.append(f"{place}: {problem}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        more = f"\n... and {self.count - MAX_LISTED} more" if self.count > MAX_LISTED else ""
        found = counted(self.count, "bad row. Fix or remove it;", "bad rows. Fix or remove them;")
        raise DataError(
            "\n".join(self.listed) + more + f"\n{found} bad rows are never skipped silently."
        )


def read_rows(source: DataSource, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of one source, in order. Problems of single rows go to `bad`.

    Raises DataError for a source that does not exist or is of an unknown kind.
    """
    path = Path(source.path)
    kind = _kind(path) if path.is_file() else None
    if kind in TEXT_FORMATS:
        try:
            with _open(path) as file:
                yield from (_read_csv if kind == ".csv" else _read_json)(path, file, bad)
        except UNREADABLE as error:
            raise DataError(
                f"{path}: cannot be read: {error}. Check that the file is whole and of the kind"
                " its name says."
            ) from None
        return
    rows: Iterable[Row]
    if kind == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = _read_saved_dataset(path, source) if path.is_dir() else _read_hub(source)
    yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows, start=1))


def source_identity(source: DataSource) -> str:
    """Returns a hash that changes with the content of the source: of the bytes of its files, or of
    the Hub revision."""
    path = Path(source.path)
    if path.is_file():
        return sha256_of_file(path)
    if path.is_dir():
        return fingerprint(
            {
                p.relative_to(path).as_posix(): sha256_of_file(p)
                for p in sorted(path.rglob("*"))
                if p.is_file()
            }
        )
    _check_hub_name(source)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(source.path).sha)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_reachable(source, error) from None


def check_source(source: DataSource) -> None:
    """Raises DataError for a local path that does not exist or is of an unknown kind. Reads
    nothing."""
    path = Path(source.path)
    if path.is_file():
        _kind(path)
    elif not path.exists():
        _check_hub_name(source)


def _kind(path: Path) -> str:
    """Returns the suffix that names the format of a file, without that of the compression."""
    endings = [s for s in path.suffixes if s not in COMPRESSED]
    kind = endings[-1] if endings else ""
    if kind not in (*TEXT_FORMATS, ".parquet"):
        raise DataError(
            f"{path}: unknown kind of file. Expected {', '.join(TEXT_FORMATS)} (also"
            f" {', '.join(COMPRESSED)}) or .parquet."
        )
    return kind


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zst":
        import pyarrow

        # Does not use the package zstandard, which takes the end of a truncated file for the end of
        # its content.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(IO[bytes], openers.get(path.suffix, Path.open)(path, "rb"))


def _read_json(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[tuple[str, Row]]:
    start = file.peek(1)[:1] if hasattr(file, "peek") else b""
    if start in (b"[", b"", b" ", b"\n", b"\t", b"\r", b"\xef"):
        content = file.read()
        if content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"[":
            yield from _read_json_array(path, content, bad)
            return
        file = io.BytesIO(content)
    for number, line in enumerate(file, start=1):
        if line.strip() and (row := _parse(line, f"{path}:{number}", bad)) is not None:
            yield f"{path}:{number}", row


def _parse(line: bytes, place: str, bad: BadRows) -> Row | None:
    try:
        row = json.loads(
            line.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constants
        )
    except UnicodeDecodeError as error:
        bad.add(place, f"not UTF-8 at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        hint = "two values on one line" if error.msg == "Extra data" else error.msg
        bad.add(place, f"not one JSON object: {hint} (column {error.colno})")
    except ValueError as error:
        bad.add(place, str(error))
    except RecursionError:
        bad.add(place, "nested too deeply")
    else:
        if isinstance(row, dict):
            return row
        bad.add(place, f"expected a JSON object, found {type(row).__name__}")
    return None


def _read_json_array(path: Path, content: bytes, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """Decodes element by element, to find the line of each."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file. Save it as UTF-8."
        ) from None
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    position, line, counted = text.index("[") + 1, 1, 0
    expect_item, has_items = True, False
    while True:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if position >= len(text):
            raise DataError(f"{place}: the array does not end with `]`. Is the file cut off?")
        if text[position] == "]" and not (expect_item and has_items):
            if text[position + 1 :].strip():
                raise DataError(f"{place}: text after the end of the array. Remove it.")
            return
        if not expect_item:
            if text[position] != ",":
                raise DataError(
                    f"{place}: expected `,` or `]` after an element, found {text[position]!r}."
                )
            position, expect_item = position + 1, True
            continue
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}). Fix"
                " the file."
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: {error}. Fix the file.") from None
        expect_item, has_items = False, True
        if isinstance(row, dict):
            yield place, row
        else:
            bad.add(place, f"expected a JSON object, found {type(row).__name__}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return row


def _no_constants(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_csv(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for line, raw in enumerate(file, start=1):
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")

    try:
        reader = csv.DictReader(lines(), strict=True)
        names = list(reader.fieldnames or [])
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(
                f"{path}:1: the header names {', '.join(map(repr, twice))} twice. Rename one of"
                " the columns."
            )
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row:
                bad.add(place, f"more fields than the header's {len(names)}")
            elif None in row.values():
                bad.add(place, f"fewer fields than the header's {len(names)}")
            else:
                yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{line}: not valid CSV in UTF-8: {error}. Fix the file.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}. Fix the file.") from None


def _read_saved_dataset(path: Path, source: DataSource) -> Iterable[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        # JSON and Arrow errors are ValueErrors
        raise DataError(
            f"{path}: not a folder written by `datasets.save_to_disk`: {error}. Save it again."
        ) from None
    is_split = isinstance(loaded, datasets.DatasetDict)
    if is_split and source.split not in loaded:
        raise DataError(
            f"{path}: no split {source.split!r}; it has {sorted(loaded)}. Set `split` of the"
            " source (data.sources)."
        )
    return loaded[source.split] if is_split else loaded


def _check_hub_name(source: DataSource) -> None:
    name = source.path
    if looks_local(name) or Path(name).suffix in (*TEXT_FORMATS, *COMPRESSED, ".parquet"):
        raise DataError(
            f"data: {name} does not exist. Give the path of a file or folder, or a Hub name such as"
            " `owner/name`."
        )


def _read_hub(source: DataSource) -> Iterable[Row]:
    _check_hub_name(source)
    import datasets

    try:
        return datasets.load_dataset(source.path, split=source.split)
    except (OSError, ValueError, ConnectionError) as error:
        raise _not_reachable(source, error) from None


def _not_reachable(source: DataSource, error: Exception) -> DataError:
    return DataError(
        f"data: {source.path} is not a local file, and the Hub does not give it"
        f" ({type(error).__name__}). Check the name and the connection, or download it and give its"
        " path."
    )
