"""Rows of every kind of file. What is wrong is named by file and line, and nothing is skipped in
silence."""

import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from sftmix.config.schema import Config, DataSource
from sftmix.data.files import find_files
from sftmix.data.prepare import prepare
from sftmix.data.readers import MAX_LISTED, BadRows, read_rows, source_identity
from sftmix.errors import DataError

GOOD = b'{"a": "x"}'
DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path


def read(path, **options):
    """Returns [(place behind the path, row)]. Raises DataError with all bad rows."""
    bad = BadRows()
    rows = list(read_rows(DataSource(path=str(path), **options), bad))
    bad.raise_if_any()
    return [(place.removeprefix(f"{path}:"), row) for place, row in rows]


BAD_LINES = {
    "a comma too many": (b'{"a": "x",}', "not one JSON object"),
    "two objects": (GOOD + b" " + GOOD, "two values on one line"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "minus infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "a key twice": (b'{"a": "x", "b": "y", "a": "z"}', "the key 'a' occurs twice in one object"),
    "a key twice inside": (b'{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice in one object"),
    "NUL in a text": (b'{"a": "x\0"}', "Invalid control character"),
    "nothing but NUL": (b"\0" * 8, "not one JSON object"),
    "bad UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7 of the line"),
    "a list": (b'["a", "x"]', "expected a JSON object, found list"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "deep nesting": (DEEP, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_and_the_lines_around_it_are_read(tmp_path, case):
    line, message = BAD_LINES[case]
    path = write(tmp_path, "rows.jsonl", b"\n".join([GOOD, line, GOOD]))
    bad = BadRows()
    assert [place for place, _ in read_rows(DataSource(path=str(path)), bad)] == [
        f"{path}:1",
        f"{path}:3",
    ]
    assert bad.count == 1 and bad.listed[0].startswith(f"{path}:2: ") and message in bad.listed[0]
    with pytest.raises(DataError, match="1 bad row\\."):
        bad.raise_if_any()


def test_a_last_line_that_is_cut_off_is_named(tmp_path):
    path = write(tmp_path, "rows.jsonl", GOOD + b"\n" + GOOD[:-3])
    with pytest.raises(DataError, match=r"rows.jsonl:2: not one JSON object: Unterminated string"):
        read(path)


def test_half_a_surrogate_pair_is_named(tmp_path):
    row = '{"prompt": "p", "completion": "%s"}\n'
    path = write(tmp_path, "rows.jsonl", (row % "\\ud83d\\ude00" + row % "half: \\ud83d").encode())
    config = {
        "run": {"dir": tmp_path},
        "model": {"architecture": {"model_type": "llama"}},
        "tokenizer": {"path": "none"},
    }
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: the text holds an unpaired surrogate(.|\n)*1 bad row\."
    ):
        prepare(Config.model_validate({**config, "data": {"path": str(path)}}), tmp_path)


def test_of_25_bad_lines_20_are_listed_and_all_are_counted(tmp_path):
    path = write(tmp_path, "rows.jsonl", b"bad\n" * 25 + GOOD)
    with pytest.raises(DataError, match="not one JSON object") as caught:
        read(path)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:MAX_LISTED]] == [
        f"{path}:{n}" for n in range(1, 21)
    ]
    assert lines[MAX_LISTED] == "... and 5 more"
    assert lines[MAX_LISTED + 1].startswith("25 bad rows") and len(lines) == MAX_LISTED + 2


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        (GOOD + b"\n" + GOOD, ["1", "2"]),
        (b"[" + GOOD + b",\n" + GOOD + b"]\n", ["1", "2"]),
        (b' \n[\n{\n"a": "x"\n},\n\n' + GOOD + b"\n]", ["3", "7"]),
        (GOOD + b"\r\n" + GOOD + b"\r\n", ["1", "2"]),
        (b"\n" + GOOD + b"\n  \n\n" + GOOD + b"\n\n", ["2", "5"]),
        (b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, ["1", "2"]),
        (b"\xef\xbb\xbf[\n" + GOOD + b",\n" + GOOD + b"]", ["2", "3"]),
    ],
    ids=[
        "lines",
        "array",
        "array over lines",
        "Windows line ends",
        "blank lines",
        "BOM and lines",
        "BOM and array",
    ],
)
def test_lines_and_arrays_are_told_apart_by_content_and_not_by_name(
    tmp_path, name, content, places
):
    path = write(tmp_path, name, content)
    assert read(path) == [(place, {"a": "x"}) for place in places]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_an_empty_file_holds_no_rows(tmp_path, name):
    assert read(write(tmp_path, name, b"")) == []


def test_an_empty_array_holds_no_rows(tmp_path):
    assert read(write(tmp_path, "rows.json", b"[ ]\n")) == []


@pytest.mark.parametrize("element", [b"[1]", b"3", b'"x"', b"null"])
def test_an_element_that_is_no_object_is_named_and_the_others_are_read(tmp_path, element):
    path = write(tmp_path, "rows.json", b"[\n" + GOOD + b",\n" + element + b",\n" + GOOD + b"\n]")
    bad = BadRows()
    assert [place for place, _ in read_rows(DataSource(path=str(path)), bad)] == [
        f"{path}:2",
        f"{path}:4",
    ]
    assert bad.count == 1 and bad.listed[0].startswith(f"{path}:3: expected a JSON object, found ")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (b',\n{"a" "x"}\n]', "rows.json:3: not valid JSON: Expecting ':' delimiter"),
        (b',\n{"a": NaN}\n]', "rows.json:3: NaN is not JSON"),
        (b',\n{"a": 1, "a": 2}\n]', "rows.json:3: the key 'a' occurs twice in one object"),
        (b',\n{"a": "x\0"}\n]', "rows.json:3: not valid JSON: Invalid control character"),
        (b',\n{"a": "\xff"}\n]', "rows.json:3: not UTF-8"),
        (b",\n" + DEEP + b"\n]", "rows.json:3: .*(recursion|nested)"),
        (b"\n" + GOOD + b"\n]", "rows.json:3: expected `,` or `]` after an element, found '{'"),
        (b",\n,\n" + GOOD + b"\n]", "rows.json:3: not valid JSON"),
        (b',\n{"a": "x', "rows.json:3: not valid JSON: Unterminated string"),
        (b",\n" + GOOD, "rows.json:3: the array does not end with `]`. Is the file cut off"),
        (b",\n", "rows.json:3: the array does not end with `]`. Is the file cut off"),
        (b"\n]\n" + GOOD, "rows.json:4: text after the end of the array"),
    ],
    ids=(
        "malformed NaN key-twice NUL bad-UTF-8 deep no-comma two-commas cut-in-text"
        " cut-after-element cut-after-comma text-behind".split()
    ),
)
def test_a_broken_array_is_refused_at_its_line(tmp_path, rest, message):
    path = write(tmp_path, "rows.json", b"[\n" + GOOD + rest)  # the first element is on line 2
    with pytest.raises(DataError, match=message):
        read(path)


ROWS = [{"a": f"{n}, {n * 7919 % 1009}", "b": f"line\n{n * n}"} for n in range(300)]
WHOLE = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": ("a,b\r\n" + "".join(f'"{row["a"]}","{row["b"]}"\r\n' for row in ROWS)).encode(),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_every_compression_gives_the_same_rows(tmp_path, kind, suffix):
    content = COMPRESS[suffix](WHOLE[kind]) if suffix else WHOLE[kind]
    assert [row for _, row in read(write(tmp_path, f"rows.{kind}{suffix}", content))] == ROWS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_of_two_compressed_parts_is_read_to_its_end(tmp_path, suffix):
    content = COMPRESS[suffix](WHOLE["jsonl"]) * 2
    assert [row for _, row in read(write(tmp_path, f"rows.jsonl{suffix}", content))] == ROWS * 2


BROKEN = {
    "not compressed": lambda content: b"plain text " * 40,
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "overwritten near its start": lambda content: content[:20] + b"\xff" * 40 + content[60:],
    "overwritten in the middle": lambda content: (
        content[: len(content) // 2] + b"\xff" * 40 + content[len(content) // 2 + 40 :]
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, kind, damage):
    path = write(tmp_path, f"rows.{kind}{suffix}", BROKEN[damage](COMPRESS[suffix](WHOLE[kind])))
    with pytest.raises(DataError, match=r"rows.*: cannot be read"):
        read(path)


def test_csv_fields_may_hold_line_breaks_commas_and_quotes(tmp_path):
    # the header is line 1, the first record lines 2 to 4, then an empty line
    path = write(tmp_path, "rows.csv", b'\xef\xbb\xbfa,b\n"one\n\ntwo, three","say ""x"""\n\ny,\n')
    (first, row), (second, other) = read(path)
    assert row == {"a": "one\n\ntwo, three", "b": 'say "x"'} and other == {"a": "y", "b": ""}
    assert 2 <= int(first) <= 4 and second == "6"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"x", "rows.csv:3: fewer fields than the header's 2"),
        (b"x,y,z", "rows.csv:3: more fields than the header's 2"),
        (b'x,"y"z', "rows.csv:3: .*',' expected after '\"'"),
        (b"x,\xff", "rows.csv:3: .*(UTF-8|utf-8)"),
        (b'x,"y', "rows.csv:[34]: .*unexpected end of data"),
    ],
    ids=["too few", "too many", "text behind a quote", "bad UTF-8", "cut off in quotes"],
)
def test_a_bad_csv_record_is_named_by_its_line(tmp_path, record, message):
    path = write(tmp_path, "rows.csv", b"a,b\nx,y\n" + record + b"\n")
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path):
    path = write(tmp_path, "rows.csv", b"a,b,a\nx,y,z\n")
    with pytest.raises(DataError, match=r"rows.csv:1: .*'a'.*twice"):
        read(path)


@pytest.fixture
def parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    turns = [[{"role": "user", "content": f"{n}?"}] for n in range(2000)]
    pq.write_table(pa.table({"messages": turns, "a": [f"text {n}" for n in range(2000)]}), path)
    return path


def test_parquet_rows_are_numbered_from_one(parquet):
    rows = read(parquet)
    assert len(rows) == 2000 and rows[0] == (
        "row 1",
        {"messages": [{"role": "user", "content": "0?"}], "a": "text 0"},
    )
    assert rows[-1][0] == "row 2000" and rows[-1][1]["a"] == "text 1999"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:4] + b"\xff" * 400 + content[404:],
        lambda content: content[:-40] + b"\xff" * 32 + content[-8:],
    ],
    ids=["empty", "cut off", "page overwritten", "footer overwritten"],
)
def test_a_damaged_parquet_file_is_refused(parquet, damage):
    parquet.write_bytes(damage(parquet.read_bytes()))
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as Parquet"):
        read(parquet)


@pytest.fixture
def saved(tmp_path):
    """Folders of a Dataset and of a DatasetDict."""
    import datasets

    datasets.disable_progress_bars()
    train, test = (
        datasets.Dataset.from_list([{"a": f"{name} {n}"} for n in range(3)])
        for name in ("train", "test")
    )
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "many")
    return tmp_path


def test_a_saved_dataset_and_the_chosen_split_of_a_saved_dict_are_read(saved):
    train = [(f"row {n + 1}", {"a": f"train {n}"}) for n in range(3)]
    assert read(saved / "one") == train
    assert read(saved / "many") == train  # the default split
    assert read(saved / "many", split="test") == [
        (f"row {n + 1}", {"a": f"test {n}"}) for n in range(3)
    ]


def test_a_missing_split_is_refused_with_those_there_are(saved):
    with pytest.raises(DataError, match=r"many: no split 'dev'; it has \['test', 'train'\]"):
        read(saved / "many", split="dev")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("data-00000-of-00001.arrow", b"not Arrow"),
        ("state.json", b"{"),
        ("dataset_info.json", b"{"),
    ],
)
def test_a_damaged_saved_dataset_is_refused(saved, file, content):
    write(saved / "one", file, content)
    with pytest.raises(DataError, match="one: "):
        read(saved / "one")


def test_a_folder_without_a_file_of_data_is_refused(tmp_path):
    write(tmp_path, "README.md", GOOD)
    with pytest.raises(DataError, match=r"no file of data is in this folder"):
        read(tmp_path)


def names(path, **options):
    """Returns the names of the files that a source reads."""
    return [p.name for p in find_files(DataSource(path=str(path), **options)).paths]


def test_a_folder_a_pattern_and_upper_case_endings_are_read(tmp_path):
    for name in ("b.JSONL", "a.ndjson", "README.md", ".hidden.jsonl"):
        write(tmp_path, name, GOOD)
    bad = BadRows()
    rows = [row for _, row in read_rows(DataSource(path=str(tmp_path)), bad)]
    assert rows == [{"a": "x"}] * 2
    assert bad.notes == [f"{tmp_path}: files not read: README.md"]
    assert names(tmp_path) == ["a.ndjson", "b.JSONL"]
    assert names(f"{tmp_path}/*.JSONL") == ["b.JSONL"]
    with pytest.raises(DataError, match="no file matches"):
        names(f"{tmp_path}/*.csv")


def test_a_snapshot_gives_the_split_that_is_asked_for(tmp_path):
    for name in ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "test.jsonl"):
        write(tmp_path, name, GOOD)
    assert names(tmp_path) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names(tmp_path, split="test") == ["test.jsonl"]
    with pytest.raises(DataError, match=r"no file has the split 'dev' in its name; there are"):
        names(tmp_path, split="dev")
    write(tmp_path, "more.jsonl", GOOD)
    with pytest.raises(DataError, match=r"more.jsonl has no split in its name, and others have"):
        names(tmp_path)


def test_the_columns_of_a_tsv_are_separated_by_tabs(tmp_path):
    assert read(write(tmp_path, "a.tsv", b"q\ta\nx, y\tz\n")) == [("2", {"q": "x, y", "a": "z"})]


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_may_be_the_one_list_of_an_object(tmp_path, indent):
    content = json.dumps({"version": "1", "data": [{"a": "x"}, {"a": "y"}]}, indent=indent)
    path, bad = write(tmp_path, "a.json", content.encode()), BadRows()
    found = list(read_rows(DataSource(path=str(path)), bad))
    assert [row for _, row in found] == [{"a": "x"}, {"a": "y"}]
    places = [place.removeprefix(f"{path}:") for place, _ in found]
    assert places == (["1", "1"] if indent is None else ["4", "7"])
    assert bad.notes == [f"{path}: rows are the list 'data'; not read: version"]


def test_an_object_with_a_conversation_is_a_row_and_one_with_two_lists_is_refused(tmp_path):
    conversation = {"messages": [{"role": "user", "content": "p"}]}
    content = json.dumps(conversation, indent=1).encode()
    assert read(write(tmp_path, "a.json", content)) == [("1", conversation)]
    content = json.dumps({"train": [{"a": "x"}], "test": [{"a": "x"}]}).encode()
    with pytest.raises(DataError, match="one JSON object with the lists 'train', 'test'"):
        read(write(tmp_path, "b.json", content))
    content = json.dumps({"1": {"a": "x"}, "2": {"a": "x"}}).encode()
    with pytest.raises(DataError, match="one JSON object of 2 objects, the first under '1'"):
        read(write(tmp_path, "c.json", content))


@pytest.mark.parametrize("name", ["rows.txt", "rows", "rows.gz", "rows.jsonl.bak", "rows.txt.xz"])
def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path, name):
    with pytest.raises(
        DataError, match=r"unknown kind of file. Expected .json, .jsonl, .ndjson, .csv"
    ):
        read(write(tmp_path, name, GOOD))


@pytest.mark.parametrize(
    "path", ["./rows", "rows.jsonl", "data/rows.parquet", "rows.json.zst", "far/too/deep", "~/rows"]
)
@pytest.mark.parametrize(
    "use",
    [find_files, source_identity, lambda source: read(source.path)],
    ids=["check", "identity", "read"],
)
def test_a_missing_path_is_refused(tmp_path, monkeypatch, path, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"{path} does not exist"):
        use(DataSource(path=path))


def test_a_hub_dataset_is_read_by_its_split_and_a_silent_hub_is_named(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: [{"a": [*names, split]}])
    assert read("owner/name", split="test", subset="main") == [
        ("row 1", {"a": ["owner/name", "main", "test"]})
    ]

    def unreachable(*names, split):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        DataError,
        match=r"owner/name is not a local file, and the Hub does not give it \(ConnectionError\)",
    ):
        read("owner/name")


def identity(path):
    return source_identity(DataSource(path=str(path)))


def test_the_identity_of_a_file_changes_with_its_content_and_not_with_its_name(tmp_path):
    path = write(tmp_path, "rows.jsonl", GOOD)
    before = identity(path)
    assert identity(path.rename(tmp_path / "other.jsonl")) == before
    assert identity(write(tmp_path, "other.jsonl", GOOD + b"\n")) != before


def test_the_identity_of_a_folder_changes_with_its_content_and_not_with_its_name(saved):
    before = identity(saved / "many")
    assert identity((saved / "many").rename(saved / "other")) == before
    state = saved / "other" / "test" / "state.json"  # deep inside
    state.write_bytes(state.read_bytes() + b"\n")
    assert identity(saved / "other") != before


CARD = """---
configs:
- config_name: all
  default: true
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: [extra/held.jsonl, data/held.jsonl]
- config_name: small
  data_files: small/*.jsonl
---
# A set
"""


def test_the_card_of_a_snapshot_says_which_files_a_split_has(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    for folder in ("data", "extra", "small"):
        (tmp_path / folder).mkdir()
    for name in ("data/train-1.jsonl", "data/train-0.jsonl", "extra/held.jsonl", "small/x.jsonl"):
        write(tmp_path, name, GOOD)

    def found(**settings):
        files = find_files(DataSource(path=str(tmp_path), **settings))
        return [p.relative_to(tmp_path).as_posix() for p in files.paths]

    assert found() == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert found(split="test") == ["extra/held.jsonl"]
    assert found(subset="small") == ["small/x.jsonl"]
    with pytest.raises(DataError, match="names no 'tiny'; there are all, small"):
        found(subset="tiny")
    with pytest.raises(DataError, match="'small' has no split 'test'; there are train"):
        found(subset="small", split="test")
    (tmp_path / "README.md").write_text(CARD.replace("  default: true\n", ""))
    with pytest.raises(DataError, match="names several configurations; there are all, small"):
        found()
    (tmp_path / "README.md").write_text(CARD.replace("data/train-*", "data/none-*"))
    with pytest.raises(DataError, match="names data/none-. for the split 'train', and .* has no"):
        found()
    # a card that names no files leaves the names of files to say it
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(DataError, match="no split in its name"):
        found()
