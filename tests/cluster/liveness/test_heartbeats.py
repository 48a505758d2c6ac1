import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import permutations

import pytest
from processes import ROOT

from sftmix.cluster.liveness import processes
from sftmix.cluster.liveness.last_words import LastWords
from sftmix.cluster.liveness.progress import Position

WORKER = ROOT / "tests/support/watch_worker.py"
TOKEN = "0123abcd"
LIMIT_SECONDS = 30  # far more than any of these takes; a hang fails instead of waiting for ever
QUICK = ("interval=0.1", "silent_seconds=2")
START = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[2:]).returncode)"


class Run:
    """Ranks as processes of their own. All write their errors to one file, as to one terminal."""

    def __init__(self, folder):
        self.folder = folder
        self.ranks, self.pids, self.port, self.started = {}, {}, "0", []

    def start(self, rank, world, *options, before=()):
        with (self.folder / "stderr").open("a") as stderr:
            self.ranks[rank] = subprocess.Popen(
                [
                    *before,
                    sys.executable,
                    str(WORKER),
                    str(self.folder),
                    str(rank),
                    str(world),
                    self.port,
                    TOKEN,
                    *QUICK,
                    *options,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self.port, pid = self.ranks[rank].stdout.readline().split()
        self.pids[rank] = int(pid)
        self.started.append(processes.Process(int(pid), processes.start_time(int(pid))))

    def tell(self, rank, command, answers=True):
        self.ranks[rank].stdin.write(command + "\n")
        self.ranks[rank].stdin.flush()
        if answers:
            assert self.ranks[rank].stdout.readline() == command + "\n", self.errors()

    def codes(self):
        return [self.ranks[rank].wait(timeout=LIMIT_SECONDS) for rank in sorted(self.ranks)]

    def errors(self):
        return (self.folder / "stderr").read_text()

    def stacks(self, rank):
        return (self.folder / "stacks" / f"rank_{rank:04d}.txt").read_text()

    def in_training(self, world, *options):
        """Starts all ranks; returns when each knows where the others are."""
        for rank in range(world):
            self.start(rank, world, *options)
        for rank in range(world):
            self.tell(rank, f"at train {rank + 10}")
        for rank in range(1, world):
            self.tell(0, f"knows {rank} train {rank + 10}")
            self.tell(rank, "knows 0 train 10")
        return self


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path)
    yield made
    for rank in made.started:  # also behind a launcher that is gone
        if rank.is_running:
            os.kill(rank.pid, signal.SIGKILL)
    for process in made.ranks.values():
        process.kill()
        process.communicate()


def only_error(run):
    lines = run.errors().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("sftmix: error: ")
    return lines[0].removeprefix("sftmix: error: ")


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_named_and_all_end(run, victim):
    run.in_training(3)
    run.ranks[victim].send_signal(signal.SIGKILL)
    assert run.codes() == [-9 if rank == victim else 1 for rank in range(3)]
    assert re.match(
        rf"rank {victim} \(.*, pid {run.pids[victim]}\) died in train, step {victim + 10}\.",
        only_error(run),
    )
    for rank in {0, 1, 2} - {victim}:
        assert "MainThread" in run.stacks(rank) or "watch_worker.py" in run.stacks(rank)


def test_ranks_killed_together_leave_the_word_to_the_others(run):
    run.in_training(4)
    for victim in (0, 1):
        run.ranks[victim].send_signal(signal.SIGSTOP)  # so that neither speaks of the other
    for victim in (0, 1):
        run.ranks[victim].send_signal(signal.SIGKILL)
    assert run.codes() == [-9, -9, 1, 1]
    assert only_error(run).startswith("rank 0 ")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_does_not_go_on(run, victim):
    run.in_training(3)
    run.ranks[victim].send_signal(signal.SIGSTOP)
    # it ends by the signal that asks for its stacks, so it does nothing between the two
    assert run.codes() == [-signal.SIGUSR2 if rank == victim else 1 for rank in range(3)]
    assert re.match(
        rf"rank {victim} \(.*\) has not answered for 2 s in train, step {victim + 10}\.",
        only_error(run),
    )
    assert "watch_worker.py" in run.stacks(victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_holds_the_gil_shows_where(run, victim):
    run.in_training(2)
    run.tell(victim, "gil", answers=False)
    assert run.codes() == [-signal.SIGUSR2 if rank == victim else 1 for rank in range(2)]
    assert f"rank {victim} " in only_error(run)
    # by itself when it was late, and for the rank that judged
    assert run.stacks(victim).count("in hold_the_gil") == 2


def test_a_rank_elsewhere_that_holds_the_gil_is_killed_by_its_neighbour(run):
    for rank, place in enumerate(("here", "there", "there")):
        run.start(rank, 3, f"place={place}")
    for rank in (1, 2):
        run.tell(0, f"knows {rank} start 0")
    run.tell(1, "gil", answers=False)
    assert run.codes() == [1, -signal.SIGUSR2, 1]
    assert only_error(run).startswith("rank 1 (there, pid")
    assert "in hold_the_gil" in run.stacks(1)


def test_a_rank_elsewhere_without_neighbours_shows_where_it_holds_the_gil(run):
    for rank, place in enumerate(("here", "there")):
        run.start(rank, 2, f"place={place}")
    run.tell(0, "knows 1 start 0")
    run.tell(1, "gil", answers=False)
    assert run.ranks[0].wait(timeout=LIMIT_SECONDS) == 1
    assert only_error(run).startswith("rank 1 (there, pid")
    assert "in hold_the_gil" in run.stacks(1)


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_what_a_rank_raises_is_told_once(run, culprit):
    run.in_training(3)
    run.tell(culprit, "code 7")
    run.tell(culprit, "fail ValueError: no such row", answers=False)
    assert run.codes() == [7, 7, 7]
    assert re.fullmatch(
        rf"rank {culprit} \(.*\) failed in train, step {culprit + 10}: ValueError: no such row",
        only_error(run),
    )


def test_what_others_raise_when_a_rank_dies_is_not_the_cause(run):
    run.in_training(3)
    # the same happens before the news of the death is there
    run.tell(2, "fail Connection closed by peer", answers=False)
    run.tell(0, "fail Connection closed by peer", answers=False)
    run.ranks[1].send_signal(signal.SIGKILL)
    assert run.codes() == [1, -9, 1]
    assert re.match(r"rank 1 \(.*\) died in train, step 11", only_error(run))


def test_a_rank_that_exits_in_the_middle_is_no_success(run):
    run.in_training(2)
    run.tell(1, "exit", answers=False)
    assert run.codes() == [1, 0]
    assert re.match(r"rank 1 \(.*\) died in train, step 11", only_error(run))


def test_a_failing_on_beat_is_a_failure_of_its_rank(run):
    run.in_training(2)
    run.tell(0, "break", answers=False)
    assert run.codes() == [1, 1]
    assert re.match(
        r"rank 0 .* failed in train, step 10: OSError: the lease cannot be written", only_error(run)
    )


def test_a_forked_child_does_not_keep_a_dead_rank_alive(run):
    run.in_training(2, "silent_seconds=3600")
    run.tell(1, "fork")
    run.ranks[1].send_signal(signal.SIGKILL)
    assert run.ranks[0].wait(timeout=LIMIT_SECONDS) == 1
    assert "died" in only_error(run)


def test_one_rank_alone(run):
    run.in_training(1)
    run.tell(0, "fail OSError: disk", answers=False)
    assert run.codes() == [1]
    assert only_error(run).endswith("failed in train, step 10: OSError: disk")


def test_a_rank_that_fails_before_it_joined(run):
    run.start(0, 2)
    run.start(1, 2, "interval=1")
    run.tell(1, "fail ImportError: no module", answers=False)
    assert run.codes() == [1, 1]
    assert re.match(r"rank 1 .* failed in start: ImportError", only_error(run))


def test_a_rank_that_never_joins(run):
    run.start(0, 3, "join_seconds=1")
    run.start(2, 3)
    assert run.codes() == [1, 1]
    assert only_error(run).startswith("rank 1 did not join within 1 s")


def test_a_position_is_as_exact_as_it_is_known():
    assert [str(Position(*known)) for known in (("start",), ("score", 0, 7), ("train", 3, 40))] == [
        "start",
        "score, micro-batch 7",
        "train, step 3",
    ]


def test_no_progress(run):
    run.in_training(2, "stall_seconds=1")
    assert run.codes() == [1, 1]
    assert only_error(run).startswith(
        "no progress for 1 s (rank 0 in train, step 10, rank 1 in train, step 11). Stacks: "
    )
    assert "watch_worker.py" in run.stacks(0)
    assert "watch_worker.py" in run.stacks(1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_normal_ends_in_any_order_are_silent(run, order):
    run.in_training(3)
    for rank in order:
        run.tell(rank, "close", answers=False)
        assert run.ranks[rank].wait(timeout=LIMIT_SECONDS) == 0
    assert run.errors() == ""
    assert list((run.folder / "stacks").iterdir()) == []


def test_a_late_rank_below_the_limit_is_no_alarm(run):
    """A hundred ranks, as connections of this test, each silent once for up to 0.75 of the
    limit."""
    run.start(0, 101, "silent_seconds=4")
    generator = random.Random(0)
    ranks, due = {}, {}
    for rank in range(1, 101):
        ranks[rank] = socket.create_connection(("127.0.0.1", int(run.port)))
        say(
            ranks[rank],
            {
                "token": TOKEN,
                "member": {"rank": rank, "host": "test", "pid": 1, "start": None, "place": {}},
            },
        )
        due[rank] = time.monotonic() + generator.uniform(0.5, 3.0)
    for rank in sorted(due, key=due.__getitem__):
        # the lateness that is the subject of this test
        time.sleep(max(0.0, due[rank] - time.monotonic()))
        say(ranks[rank], {"beat": ["train", 1, 1]})
        say(ranks[rank], {"bye": True})
    run.tell(0, "close", answers=False)
    assert run.codes() == [0]
    assert run.errors() == ""


def test_a_rank_that_was_stopped_for_less_than_the_limit_goes_on(run):
    run.in_training(2, "silent_seconds=4")
    for victim in (0, 1):
        run.ranks[victim].send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        run.ranks[victim].send_signal(signal.SIGCONT)
        run.tell(victim, "at train 20")
        run.tell(1 - victim, f"knows {victim} train 20")
    for rank in (1, 0):
        run.tell(rank, "close", answers=False)
    assert run.codes() == [0, 0]
    assert run.errors() == ""


def test_a_machine_that_stood_still_as_a_whole_goes_on(run):
    run.in_training(2)
    for signum in (signal.SIGSTOP, signal.SIGCONT):
        for rank in (0, 1):
            run.ranks[rank].send_signal(signum)
        time.sleep(3 if signum == signal.SIGSTOP else 0)  # longer than the limit
    for rank in (0, 1):
        run.tell(rank, "at train 20")
    for rank in (0, 1):
        run.tell(rank, f"knows {1 - rank} train 20")
    for rank in (0, 1):  # not before both know: of one that has left nothing is known
        run.tell(rank, "close", answers=False)
    assert run.codes() == [0, 0]
    assert run.errors() == ""


def test_strangers_are_ignored(run):
    run.start(0, 2)
    member = {"rank": 1, "host": "test", "pid": 1, "start": None, "place": {}}
    for line in (
        json.dumps({"token": "wrong", "member": member}),
        json.dumps({"member": member}),
        json.dumps({"token": TOKEN, "member": {**member, "rank": 2}}),
        json.dumps({"token": TOKEN}),
        json.dumps({"token": TOKEN, "member": {**member, "rank": float("inf")}}),
        json.dumps({"token": "\ud800", "member": member}),
        "GET / HTTP/1.1",
        "[1]",
        "[" * 100_000,
    ):
        with socket.create_connection(("127.0.0.1", int(run.port))) as stray:
            stray.settimeout(LIMIT_SECONDS)
            stray.sendall(line.encode() + b"\n")
            assert not received(stray), line
    silent = socket.create_connection(("127.0.0.1", int(run.port)))
    run.start(1, 2)
    run.tell(0, "knows 1 start 0")
    for rank in (0, 1):
        run.tell(rank, "close", answers=False)
    assert run.codes() == [0, 0]
    assert run.errors() == ""
    silent.close()


def test_a_rank_that_comes_and_goes_in_one_breath_is_no_alarm(run):
    run.start(0, 2)
    with socket.create_connection(("127.0.0.1", int(run.port))) as rank:
        member = {"rank": 1, "host": "test", "pid": 1, "start": None, "place": {}}
        rank.sendall(
            b"".join(
                json.dumps(m).encode() + b"\n"
                for m in ({"token": TOKEN, "member": member}, {"bye": True})
            )
        )
        while received(rank):
            pass
    run.tell(0, "at train 1")
    run.tell(0, "close", answers=False)
    assert run.codes() == [0]
    assert run.errors() == ""


def test_a_rank_that_leaves_before_rank_0_has_answered_says_goodbye(run):
    with socket.create_server(("127.0.0.1", 0)) as rank_0:
        run.port = str(rank_0.getsockname()[1])
        run.start(1, 2)
        connection, _ = rank_0.accept()
        run.tell(1, "close", answers=False)
        with connection, connection.makefile() as lines:
            messages = [json.loads(line) for line in lines]
    assert messages[0]["token"] == TOKEN and messages[-1] == {"bye": True}
    assert run.codes() == [0]
    assert run.errors() == ""


def test_lines_in_pieces_are_put_together(run):
    run.start(0, 2)
    with socket.create_connection(("127.0.0.1", int(run.port))) as rank:
        text = (
            json.dumps(
                {
                    "token": TOKEN,
                    "member": {"rank": 1, "host": "test", "pid": 1, "start": None, "place": {}},
                }
            )
            + "\n"
        )
        for piece in (
            text[:10],
            text[10:50],
            text[50:] + '{"beat": ["tr',
            'ain", 5, 5]}\n{"by',
            'e": true}\n',
        ):
            rank.sendall(piece.encode())
            time.sleep(0.05)
        assert received(rank)
    run.tell(0, "close", answers=False)
    assert run.codes() == [0]
    assert run.errors() == ""


@pytest.mark.parametrize("name", ["deepspeed", "-m torch.distributed.run"])
def test_a_killed_launcher_takes_its_rank_with_it(run, name):
    run.start(0, 1, before=[sys.executable, "-c", START, name])
    (rank,) = run.started
    run.ranks[0].kill()
    wait_until(lambda: not rank.is_running)


def test_a_killed_launcher_takes_a_rank_with_it_that_holds_the_gil(run):
    run.start(0, 1, before=[sys.executable, "-c", START, "torchrun"])
    (rank,) = run.started
    run.tell(0, "gil", answers=False)
    run.ranks[0].kill()
    wait_until(lambda: not rank.is_running)


def test_a_killed_launcher_of_the_launcher_is_named(run):
    run.start(
        0,
        1,
        before=[sys.executable, "-c", START, "sftmix", sys.executable, "-c", START, "deepspeed"],
    )
    (rank,) = run.started
    run.ranks[0].kill()
    wait_until(lambda: not rank.is_running)
    assert re.match(
        rf"the launcher of rank 0 .* is gone \(pid {run.ranks[0].pid}: .* sftmix .*start it again",
        only_error(run),
    )


def test_a_shell_that_ends_is_no_launcher_that_died(run):
    run.start(0, 1, before=["sh", "-c", 'exec 3<&0; "$@" <&3 & wait', "deepspeed"])
    run.ranks[0].kill()
    run.tell(0, "at train 1")
    run.tell(0, "at train 2")
    (rank,) = run.started
    assert rank.is_running
    run.tell(0, "close", answers=False)
    wait_until(lambda: not rank.is_running)
    assert run.errors() == ""


def test_of_many_causes_at_once_one_is_printed(tmp_path, capfd):
    words = [LastWords(tmp_path, rank, TOKEN) for rank in range(20)]
    start = threading.Barrier(20)

    def speak(one, rank):
        start.wait()
        one.print_once(f"cause {rank}")

    threads = [threading.Thread(target=speak, args=(one, rank)) for rank, one in enumerate(words)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in words:
        one.forget()
    assert re.fullmatch(r"sftmix: error: cause \d+\n", capfd.readouterr().err)


def say(connection, message):
    connection.sendall(json.dumps(message).encode() + b"\n")


def received(connection):
    try:
        return connection.recv(65536)
    except ConnectionResetError:
        return b""


def wait_until(condition):
    deadline = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_of_two_hosts_that_no_longer_reach_each_other_both_say_so_and_each_side_once(
    tmp_path, capfd
):
    words = [LastWords(tmp_path, rank, "token") for rank in range(3)]
    try:
        words[1].print_once("rank 0 is silent", cut_off=0)  # where nobody may see it
        words[0].print_once("rank 1 is silent", cut_off=1)
        words[2].print_once("rank 0 is silent", cut_off=0)  # beside rank 1
        words[2].print_once("another cause")
        words[0].print_once("another cause")
    finally:
        for each in words:
            each.forget()
    said = capfd.readouterr().err
    assert (
        said.count("rank 0 is silent")
        == said.count("rank 1 is silent")
        == said.count("another cause")
        == 1
    )
