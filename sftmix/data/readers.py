"""Read rows of files, each with its place (`file:line`), and check them one by one.

JSON and CSV are parsed here instead of by `datasets`, which silently accepts missing keys, nulls,
mixed types and two objects on a line, and whose errors name no line. Parquet, saved datasets and
the Hub, which carry a schema, are read with `datasets`.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from sftmix.config.schema import DataSource
from sftmix.data.files import TABLES, find_files, kind_of
from sftmix.data.formats import FIELDS
from sftmix.errors import DataError, counted
from sftmix.storage.failures import accessing
from sftmix.storage.files import sha256_of_file
from sftmix.storage.provenance import fingerprint

Row = dict[str, Any]

MAX_LISTED = 20  # bad rows in one message
# a truncated or damaged file, or another format
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)


class BadRows:
    """Collects the problems of single rows, so that one error reports all of them. notes: sentences
    on what is not read.

    skip_to: file that receives place, problem and, where it was read, row of each; None: bad rows
    are an error.
    """

    def __init__(self, skip_to: Path | None = None) -> None:
        self.count = 0
        self.listed: list[str] = []
        self.notes: list[str] = []
        self._skip_to = skip_to
        if skip_to is not None:
            with accessing(skip_to):
                skip_to.write_text("")

    def add(self, place: str, problem: str, row: Row | None = None) -> None:
        self.count += 1
        if self._skip_to is not None:
            record = {"place": place, "problem": problem} | ({} if row is None else {"row": row})
            with accessing(self._skip_to), self._skip_to.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, default=str) + "\n")
        elif self.count <= MAX_LISTED:
            self.listed.append(f"{place}: {problem}")

    def raise_if_any(self) -> None:
        """Raises DataError with all of them, unless they are skipped."""
        if not self.count or self._skip_to is not None:
            return
        more = f"\n... and {self.count - MAX_LISTED} more" if self.count > MAX_LISTED else ""
        found = counted(self.count, "bad row. Fix or remove it;", "bad rows. Fix or remove them;")
        raise DataError(
            "\n".join(self.listed) + more + f"\n{found} bad rows are never skipped silently"
            " (data.on_error=skip leaves them out and lists them)."
        )


def read_rows(source: DataSource, bad: BadRows) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of one source, in order. Problems of single rows go to `bad`.

    Raises DataError for a source that does not exist or is of an unknown kind.
    """
    files = find_files(source)
    if files is None:
        folder = Path(source.path)
        rows = _read_saved_dataset(folder, source) if folder.is_dir() else _read_hub(source)
        yield from numbered(source.path, rows)
        return
    if files.others:
        bad.notes.append(f"{source.path}: files not read: {', '.join(files.others)}")
    for path in files.paths:
        yield from _read_file(path, bad)


def _read_file(path: Path, bad: BadRows) -> Iterator[tuple[str, Row]]:
    kind = kind_of(path)
    if kind == ".parquet":
        yield from numbered(path, _read_parquet(path))
        return
    try:
        with _open(path) as file:
            if kind in TABLES:
                yield from _read_csv(path, file, bad, "\t" if kind == ".tsv" else ",")
            else:
                yield from _read_json(path, file, bad)
    except UNREADABLE as error:
        raise DataError(
            f"{path}: cannot be read: {error}. Check that the file is whole and of the kind"
            " its name says."
        ) from None


def numbered(name: object, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Yields (place, row) of Arrow data, as a JSON file would have them. Arrow gives every struct
    the keys of all; those without a value are left out below the columns."""
    for number, row in enumerate(rows, start=1):
        yield f"{name}:row {number}", {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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
    files = find_files(source)
    if files is not None:
        return fingerprint({p.as_posix(): sha256_of_file(p) for p in files.paths})
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(source.path).sha)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _not_reachable(source, error) from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".zst":
        import pyarrow

        # Does not use the package zstandard, which takes the end of a truncated file for the end of
        # its content.
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return cast(IO[bytes], openers.get(path.suffix.lower(), Path.open)(path, "rb"))


def _read_json(path: Path, file: IO[bytes], bad: BadRows) -> Iterator[tuple[str, Row]]:
    """Lines of objects, one array of objects, or one object that holds such an array."""
    first = file.readline()
    while first and not first.strip(b"\xef\xbb\xbf \r\n\t"):
        first += file.readline()
    start = first.lstrip(b"\xef\xbb\xbf \r\n\t")
    if start[:1] == b"[":
        text = _decoded(path, first + file.read())
        end = yield from _read_array(path, text, text.index("["), bad)
        if text[end:].strip():
            behind = len(text) - len(text[end:].lstrip())
            number = text.count("\n", 0, behind) + 1
            raise DataError(f"{path}:{number}: text after the end of the array. Remove it.")
        return
    rest: Iterable[bytes] = file
    second = file.readline()
    if not second.strip() or not _is_json(start):
        content = first + second + file.read()
        whole = _keys_of_file(content)
        if whole is not None:
            yield from _rows_of_keys(path, *whole, bad)
            return
        rest = io.BytesIO(content)
    else:
        rest = itertools.chain(io.BytesIO(first + second), file)
    for number, line in enumerate(rest, start=1):
        if line.strip() and (row := _parse(line, f"{path}:{number}", bad)) is not None:
            yield f"{path}:{number}", row


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _keys_of_file(content: bytes) -> tuple[str, list[tuple[str, int, Any]]] | None:
    """Returns the text of a file that is one JSON object, and (key, place of its value, value) of
    each of its keys; None for another content."""
    try:
        text = content.decode("utf-8-sig")
        if not isinstance(json.loads(text, parse_constant=_no_constants), dict):
            return None
    except (ValueError, RecursionError):
        return None
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates)
    position, found = text.index("{") + 1, []
    while (key_at := _skip(text, position, " \t\r\n,")) is not None and text[key_at] != "}":
        try:
            key, position = decoder.raw_decode(text, key_at)
            value_at = _skip(text, position, " \t\r\n:")
            assert value_at is not None, "the object was parsed"
            value, position = decoder.raw_decode(text, value_at)
        except ValueError:  # a key that occurs twice
            return None
        found.append((key, value_at, value))
    return text, found


def _skip(text: str, position: int, characters: str) -> int | None:
    """Returns the place of the next character that is none of these."""
    return next((n for n in range(position, len(text)) if text[n] not in characters), None)


def _rows_of_keys(
    path: Path, text: str, items: list[tuple[str, int, Any]], bad: BadRows
) -> Iterator[tuple[str, Row]]:
    """Yields the rows of the one list of objects that an object holds; the object itself, if its
    lists are fields of a format."""
    lists = [
        (key, at)
        for key, at, value in items
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    is_row = any(key in FIELDS for key, _, _ in items)
    if (
        not is_row
        and not lists
        and len(items) > 1
        and all(isinstance(v, dict) for _, _, v in items)
    ):
        raise DataError(
            f"{path}: one JSON object of {len(items):,} objects, the first under {items[0][0]!r}."
            " Expected a list of rows, or one row per line; write the objects as such."
        )
    if is_row or not lists:
        if text.strip() and items:
            yield (
                f"{path}:{text.count(chr(10), 0, text.index('{')) + 1}",
                {key: value for key, _, value in items},
            )
        return
    if len(lists) > 1:
        raise DataError(
            f"{path}: one JSON object with the lists {', '.join(repr(key) for key, _ in lists)}."
            " Expected one list of rows; write each to a file of its own."
        )
    [(key, at)] = lists
    others = [name for name, _, _ in items if name != key]
    if others:
        bad.notes.append(f"{path}: rows are the list {key!r}; not read: {', '.join(others)}")
    yield from _read_array(path, text, at, bad)


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


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 at byte {error.start} of the file. Save it as UTF-8."
        ) from None


def _read_array(
    path: Path, text: str, start: int, bad: BadRows
) -> Generator[tuple[str, Row], None, int]:
    """Decodes the array at `start` element by element, to find the line of each. Returns where it
    ends."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    position, line, counted = start + 1, 1, 0
    expect_item, has_items = True, False
    while True:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        place = f"{path}:{line}"
        if position >= len(text):
            raise DataError(f"{place}: the array does not end with `]`. Is the file cut off?")
        if text[position] == "]" and not (expect_item and has_items):
            return position + 1
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


def _read_csv(
    path: Path, file: IO[bytes], bad: BadRows, delimiter: str
) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(1 << 30)
    line = 0

    def lines() -> Iterator[str]:
        nonlocal line
        for line, raw in enumerate(file, start=1):
            yield raw.decode("utf-8-sig" if line == 1 else "utf-8")

    try:
        reader = csv.DictReader(lines(), strict=True, delimiter=delimiter)
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


def _read_hub(source: DataSource) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split)
    except (OSError, ValueError, ConnectionError) as error:
        raise _not_reachable(source, error) from None


def _not_reachable(source: DataSource, error: Exception) -> DataError:
    return DataError(
        f"data: {source.path} is not a local file, and the Hub does not give it"
        f" ({type(error).__name__}). Check the name and the connection, or download it and give its"
        " path."
    )
