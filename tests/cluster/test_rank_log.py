"""A rank's own log holds all that it printed, however it ended, and its exit code and console stay
as they were."""

import re
import subprocess
import sys

import pytest
from processes import ROOT

START = (
    "import sys; from pathlib import Path; from sftmix.cluster import rank_log;"
    " rank_log.start(Path(sys.argv[1]), 3); "
)


def rank(folder, code, **options):
    command = [sys.executable, "-c", START + code, str(folder)]
    return subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("sys.exit(75)", 75),
        ("import os; os.write(2, b'last words'); os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("raise ValueError('why')", 1),
    ],
)
def test_everything_is_in_the_file_and_on_the_console(tmp_path, ending, code):
    done = rank(
        tmp_path / "logs",
        "print('one'); import os; os.system('echo child'); print('two', file=sys.stderr);"
        f" {ending}",
    )
    text = (tmp_path / "logs/rank_0003.log").read_text()
    header, body = text.split("\n", 1)
    assert re.fullmatch(r"--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ host \S+ pid \d+", header)
    assert done.returncode == code and done.stdout == body and body.startswith("one\nchild\ntwo\n")
    for words in ("last words", "ValueError: why"):
        assert (words in body) == (words.split()[-1] in ending)


def test_a_second_attempt_is_added(tmp_path):
    for word in ("first", "second"):
        rank(tmp_path, f"print('{word}')")
    assert re.fullmatch(r"---.*\nfirst\n---.*\nsecond\n", (tmp_path / "rank_0003.log").read_text())


def test_the_file_goes_on_where_the_console_has_gone(tmp_path):
    code = "import time; print('early', flush=True); time.sleep(0.5); print('late'); sys.exit(0)"
    process = subprocess.Popen(
        [sys.executable, "-c", START + code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"early\n"
    process.stdout.close()  # the connection to the node is lost
    assert process.wait(timeout=60) == 0 and "late" in (tmp_path / "rank_0003.log").read_text()


def test_signals_to_the_whole_tree_lose_nothing(tmp_path):
    code = (
        "import os, signal; signal.signal(15, lambda *a: (print('stopping'), sys.exit(75)));"
        " os.killpg(0, 15); import time; time.sleep(5)"
    )
    done = rank(tmp_path, code, start_new_session=True)
    assert (
        done.returncode == 75
        and done.stdout == "stopping\n"
        and "stopping" in (tmp_path / "rank_0003.log").read_text()
    )


def test_a_log_that_cannot_be_written_is_said_and_the_rank_goes_on(tmp_path):
    (tmp_path / "logs").write_text("a file")
    done = rank(tmp_path / "logs", "print('on')")
    assert (
        done.returncode == 0
        and "rank 3: " in done.stdout
        and "cannot be written" in done.stdout
        and done.stdout.endswith("on\n")
    )


def test_ranks_may_begin_their_logs_before_rank_0_claims_the_folder(tmp_path):
    from sftmix.config.reader import load_config
    from sftmix.errors import ArtifactError
    from sftmix.pipeline import guard

    config = load_config(str(ROOT / "configs/quickstart.yaml"), [f"run.dir={tmp_path / 'run'}"])
    (tmp_path / "run/logs").mkdir(parents=True)
    with guard.holding(config) as hold:
        assert hold.attempt == 1 and hold.outcome() is None
    (tmp_path / "run/config.yaml").unlink()
    with (
        pytest.raises(ArtifactError, match="is not empty and is not a run folder"),
        guard.holding(config),
    ):
        pass
