import itertools
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from processes import ROOT

from sftmix.cluster.liveness import run_lock
from sftmix.errors import ArtifactError
from sftmix.storage.files import write_json

WORKER = ROOT / "tests/support/run_lock_worker.py"


@pytest.fixture
def start(tmp_path):
    """Starts fence_worker.py on tmp_path/run; what is left of it ends with the test."""
    started = []

    def worker(*arguments):
        process = subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path / "run"), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield worker
    for process in started:
        process.kill()
        process.communicate()


def kill(process):
    process.kill()
    process.wait()


def test_attempts_count_up_and_tell_their_story(tmp_path):
    first = run_lock.claim(tmp_path / "run")
    first.release()
    second = run_lock.claim(tmp_path / "run")
    assert (first.attempt, second.attempt) == (1, 2)
    record = json.loads((tmp_path / "run" / "attempts" / "000001.json").read_text())
    assert record["pid"] == os.getpid()
    assert {
        "attempt",
        "host",
        "pid",
        "process_start",
        "user",
        "started",
        "boot_id",
        "ended",
    } <= record.keys()
    assert "ended" not in json.loads((tmp_path / "run" / "attempts" / "000002.json").read_text())


def test_a_living_holder_is_named_at_once(tmp_path, start):
    holder = start("still")  # on one machine the process table decides, not the lease
    assert holder.stdout.readline() == "attempt 1\n"
    with pytest.raises(
        ArtifactError,
        match=(
            rf"attempt 1, host .*, pid {holder.pid}, since 20.*stop it, or choose another run.dir"
        ),
    ):
        run_lock.claim(tmp_path / "run", patience_seconds=3600)
    holder.send_signal(signal.SIGSTOP)  # stopped is not dead
    with pytest.raises(ArtifactError, match=f"pid {holder.pid}"):
        run_lock.claim(tmp_path / "run", patience_seconds=3600)


def test_a_killed_holder_is_superseded_at_once(tmp_path, start):
    holder = start("hold")
    holder.stdout.readline()
    kill(holder)
    assert run_lock.claim(tmp_path / "run", patience_seconds=3600).attempt == 2


def test_a_pid_that_was_used_again_is_not_the_holder(tmp_path):
    held = run_lock.claim(tmp_path / "run")  # by this process, which lives
    path = tmp_path / "run" / "attempts" / "000001.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "process_start": record["process_start"] - 1}))
    assert run_lock.claim(tmp_path / "run", patience_seconds=3600).attempt == 2
    with pytest.raises(run_lock.SupersededError):
        held.check()


def test_a_holder_on_another_host_is_refused_while_it_renews(tmp_path, start):
    holder = start("hold", "elsewhere")
    holder.stdout.readline()
    with pytest.raises(ArtifactError, match=f"host elsewhere, pid {holder.pid}"):
        run_lock.claim(tmp_path / "run", patience_seconds=60)


@pytest.mark.parametrize("other", ["host", "boot_id", "pid_namespace"])
def test_a_holder_elsewhere_that_does_not_renew_is_superseded(tmp_path, other):
    held = run_lock.claim(tmp_path / "run")
    path = tmp_path / "run" / "attempts" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), other: "other"}))
    new = run_lock.claim(tmp_path / "run", patience_seconds=0.3)
    assert new.attempt == 2
    new.check()
    for forbidden in (held.check, held.renew):
        with pytest.raises(
            run_lock.SupersededError,
            match=(
                rf"attempt 2 \(host .*, pid {os.getpid()}\) has taken over .* nothing more is"
                r" written"
            ),
        ):
            forbidden()


def test_the_lease_of_a_superseded_attempt_counts_for_nothing(tmp_path):
    run_lock.claim(tmp_path / "run")
    attempts = tmp_path / "run" / "attempts"
    path = attempts / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    done = threading.Event()

    def renew():
        for counter in itertools.count():
            if done.is_set():
                return
            write_json(attempts / "lease", {"attempt": 0, "key": "of another", "counter": counter})

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        assert run_lock.claim(tmp_path / "run", patience_seconds=0.5).attempt == 2
    finally:
        done.set()
        thread.join()


def test_who_claims_later_does_not_judge_the_winner_by_the_rest_of_its_patience(
    tmp_path, monkeypatch
):
    create = run_lock._create

    def another_is_faster(attempts, number):
        monkeypatch.undo()
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "elsewhere")
            create(attempts, number)
        return create(attempts, number)

    monkeypatch.setattr(run_lock, "_create", another_is_faster)
    with pytest.raises(ArtifactError, match="attempt 1, host elsewhere"):
        run_lock.claim(tmp_path / "run", patience_seconds=0)


def test_a_released_attempt_elsewhere_needs_no_patience(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    run_lock.claim(tmp_path / "run").release()
    monkeypatch.undo()
    assert run_lock.claim(tmp_path / "run", patience_seconds=3600).attempt == 2


# the process table decides; the lease does
@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b")])
def test_of_two_claims_at_once_one_wins(tmp_path, start, hosts):
    for attempt in range(1, 11):
        claimants = [start("race", host) for host in hosts]
        for claimant in claimants:
            assert claimant.stdout.readline() == "ready\n"
        for claimant in claimants:
            claimant.stdin.write("\n")
            claimant.stdin.flush()
        answers = sorted(claimant.stdout.readline() for claimant in claimants)
        assert answers[0] == f"attempt {attempt}\n"
        assert answers[1].startswith("refused: ")
        assert "written by another run" in answers[1]
        for claimant in claimants:
            kill(claimant)
        path = tmp_path / "run" / "attempts" / f"{attempt:06d}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "ended": "for the next race"}))


def test_a_claim_that_was_cut_off_is_superseded_after_the_patience(tmp_path):
    attempts = tmp_path / "run" / "attempts"
    attempts.mkdir(parents=True)
    (attempts / "000001.json").touch()
    assert run_lock.claim(tmp_path / "run", patience_seconds=0.3).attempt == 2


def test_a_worker_joins_the_attempt_it_was_told(tmp_path):
    held = run_lock.claim(tmp_path / "run")
    worker = run_lock.join(tmp_path / "run", held.attempt)
    worker.check()
    held.release()
    run_lock.claim(tmp_path / "run")
    with pytest.raises(run_lock.SupersededError):
        worker.check()
    with pytest.raises(ArtifactError, match="000007.json is missing"):
        run_lock.join(tmp_path / "run", 7)


def test_a_run_folder_made_anew_is_another_run_folder(tmp_path):
    held = run_lock.claim(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "removed")
    with pytest.raises(run_lock.SupersededError, match="was removed"):
        held.check()
    assert run_lock.claim(tmp_path / "run").attempt == held.attempt
    with pytest.raises(run_lock.SupersededError, match="was removed"):
        held.check()


def test_the_last_fifty_attempts_are_kept(tmp_path):
    for _ in range(53):
        run_lock.claim(tmp_path / "run").release()
    names = sorted(path.name for path in (tmp_path / "run" / "attempts").glob("*.json"))
    assert (len(names), names[0], names[-1]) == (50, "000004.json", "000053.json")


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ArtifactError, match="cannot be written .* choose another run.dir"):
        run_lock.claim(tmp_path / "run")
