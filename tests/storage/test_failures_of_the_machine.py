"""What the machine refuses is one line with the file and the remedy; what it is not to blame for is
left alone."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import ROOT
from tokenizers_for_tests import character_tokenizer

from sftmix.engine.ranks import Ranks
from sftmix.errors import ArtifactError
from sftmix.storage.failures import REMEDIES, accessing, describe, error_number, explain
from sftmix.storage.files import write_text
from sftmix.train.log import RunLog

NUMBERS = np.random.default_rng(0).random(100_000)


def with_safetensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.from_numpy(NUMBERS)}, path)


def with_polars(path):
    import polars as pl

    pl.DataFrame({"a": NUMBERS}).lazy().sink_parquet(path)


def with_arrow(path):
    table = pa.table({"a": NUMBERS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def with_tokenizers(path):
    character_tokenizer([f"<{n}>" for n in range(2000)]).save_pretrained(path)


WRITERS = {
    "safetensors": with_safetensors,
    "polars": with_polars,
    "arrow": with_arrow,
    "parquet": lambda path: pq.write_table(pa.table({"a": NUMBERS}), path),
    "numpy": lambda path: np.save(path, NUMBERS),
    "tokenizers": with_tokenizers,
    "text": lambda path: path.write_text("a" * 1_000_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_the_same_error_whatever_library_writes(name, mounted):
    path = mounted("size=16k") / "out.npy"
    with pytest.raises(OSError) as raised, accessing(path):
        WRITERS[name](path)
    assert raised.value.errno == errno.ENOSPC and str(path) in str(raised.value.filename)
    assert f"{path.parent}" in str(
        explain(raised.value, Path("/elsewhere"))
    ) and "Free some space" in str(explain(raised.value, Path("/elsewhere")))


def test_published_text_names_itself_on_a_full_disk(mounted):
    folder = mounted("size=16k")
    with pytest.raises(OSError) as raised:
        write_text(folder / "summary.json", "a" * 1_000_000)
    assert raised.value.filename == str(folder / "summary.json")


def test_lists_of_a_split_need_their_space_at_once(mounted):
    """A write to mapped memory without space behind it would kill the process."""
    code = (
        "import sys; from pathlib import Path; from sftmix.pairing.on_files import _new_list\n"
        "try: _new_list(Path(sys.argv[1]) / 'a.npy', 100_000)[:] = 1\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    folder = mounted("size=16k")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{errno.ENOSPC} {folder / 'a.npy'}\n")


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**15)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_is_not_there_is_one_line_with_a_remedy(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        allocate()
    said = str(explain(raised.value))
    assert (
        said.startswith("out of memory: ")
        and "micro_batch_tokens" in said
        and "\n" not in said
        and "alloc_cpu" not in said
    )


def test_memory_of_a_gpu():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of\n79 GiB."
    )
    assert str(explain(error)).startswith(
        "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. Lower "
    )


@pytest.mark.parametrize("number", REMEDIES)
def test_each_refusal_has_the_systems_words_and_a_remedy(number):
    said = str(explain(OSError(number, os.strerror(number), "/some/file"), Path("/elsewhere")))
    assert said.startswith(f"/some/file: {os.strerror(number)}") and said.endswith(REMEDIES[number])
    assert str(explain(OSError(number, os.strerror(number)), Path("/run"))).startswith(
        "a file in /run, or stdout: "
    )


def test_the_number_in_an_error_of_a_rust_library_counts():
    assert error_number(Exception("I/O error: whatever (os error 27)")) == errno.EFBIG
    assert explain(Exception("no such tensor (os error 2)")) is None


def test_free_and_needed_space_are_told(tmp_path):
    said = describe(
        OSError(errno.ENOSPC, "", str(tmp_path / "not" / "there")), needed_bytes=3 * 2**20
    )
    assert "MiB free, 3.0 MiB needed)" in said


@pytest.mark.parametrize(
    "error",
    [
        KeyError("a"),
        RuntimeError("shapes differ"),
        FileNotFoundError(2, "No such file or directory", "a"),
        TypeError("x"),
        OSError("x"),
    ],
)
def test_a_bug_is_not_explained_away(error, tmp_path):
    assert explain(error) is None
    with pytest.raises(type(error)) as raised, accessing(tmp_path):
        raise error
    assert raised.value is error


def test_an_error_that_has_its_line_keeps_it(tmp_path):
    error = ArtifactError("a copy failed: No space left on device")
    assert explain(error) is None and error_number(error) == errno.ENOSPC
    with pytest.raises(ArtifactError), accessing(tmp_path):
        raise error


# full when the file is created, and later in the writer's thread
@pytest.mark.parametrize("size", ["4k", "16k"])
def test_a_full_disk_under_tensorboard_is_said_once_and_the_run_goes_on(
    size, mounted, tmp_path, capfd
):
    log = RunLog(
        "baseline",
        Ranks(0, 1, 0, torch.device("cpu")),
        metrics=tmp_path / "metrics.jsonl",
        tensorboard=mounted(f"size={size}") / "tb",
        every_steps=1,
        has_mixup=False,
        has_router=False,
    )
    log.start(num_steps=2)
    line = {
        "epoch": 0,
        "loss/ntp (nats/token)": 1.0,
        "tokens/real (tokens/s)": 1.0,
        "grad_norm": 1.0,
        "learning_rate": 1.0,
    }
    for step in range(400):
        log._write(step, {"step": step, **line})
    log.finish()
    said, errors = capfd.readouterr()
    assert (
        said.count("TensorBoard is left out from here on: ") == 1
        and "No space left on device" in said
        and "Traceback" not in errors
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 400
