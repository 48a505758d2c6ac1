"""Heartbeats: a rank that dies, hangs or fails ends the run on all ranks, with one clear cause.

Every rank runs one thread. Rank 0's listens, the others' connect to it; both sides send a line each
second. Rank 0 judges the others and the others judge rank 0:

    the connection closed without a goodbye    the rank died: at once
    no line for `silent_seconds`               it hangs: suspended, or its GIL is held
    `fail(text)`                               it raised
    no rank's position changed                 no progress for `stall_seconds`

Then rank 0 tells all ranks; each writes its stacks, the first cause is printed once, and all end
with the same code. If rank 0 died or hangs, each other rank detects it by itself. Each rank also
watches its launchers, because DeepSpeed and torchrun leave their ranks running when they are
killed.

The token rejects foreign connections. Neither it nor the lines are encrypted: the network between
hosts must be trusted.
"""

from __future__ import annotations

import hmac
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import NoReturn

from sftmix.cluster.liveness import processes
from sftmix.cluster.liveness.last_words import LastWords, end, end_silent
from sftmix.cluster.liveness.lines import Connection, Message, listen
from sftmix.cluster.liveness.members import Member, Peer, Verdict, member_of
from sftmix.cluster.liveness.progress import Position, Progress

__all__ = ["Watch", "listen"]

LONGEST_WAIT_SECONDS = 0.25
# an error may be the consequence of another rank's death, whose news arrives a moment later
GRACE_SECONDS = 1.0
ALONE_SECONDS = 5.0  # how long a failed rank waits for rank 0's decision before it ends by itself
GOODBYE_SECONDS = 2.0
# fraction of silent_seconds after which a rank writes its stacks without being asked
ITSELF_FACTOR = 0.9
# number of living ranks that a beat of rank 0 names; the lowest of them prints if rank 0 cannot
NUM_NAMED = 16


class Watch:
    """The heartbeat of one rank, from `start` to `close`. `exit_code`: of all ranks if this one
    fails or decides. `on_beat` is called in the thread once per interval; an exception in it is a
    failure of this rank.

    progress: what this rank is doing. stall_seconds: how long its position may stay the same while
    it can stall; None: no limit.

    listener: rank 0's, from `listen`. address: where the others connect. launchers: those found at
    the start of the process, if that is earlier; otherwise a launcher that ended before the search
    would be missed.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        address: tuple[str, int] | None,
        token: str,
        folder: Path,
        listener: socket.socket | None = None,
        silent_seconds: float = 20.0,
        interval: float = 1.0,
        stall_seconds: float | None = None,
        progress: Progress | None = None,
        join_seconds: float = 300.0,
        on_beat: Callable[[], None] | None = None,
        launchers: Sequence[processes.Process] | None = None,
    ):
        self.rank, self.world_size = rank, world_size
        self.progress = progress or Progress()
        self.exit_code = 1
        self._stall_seconds = stall_seconds
        self._address, self._listener, self._token, self._folder = address, listener, token, folder
        self._silent_seconds, self._interval, self._join_seconds = (
            silent_seconds,
            interval,
            join_seconds,
        )
        self._on_beat, self._launchers = on_beat, launchers
        self._place = processes.namespace()
        self._member = Member(
            rank,
            str(self._place["host"]),
            os.getpid(),
            processes.start_time(os.getpid()),
            self._place,
        )
        self._peers: dict[int, Peer] = {}
        self._left: set[int] = set()
        # connected, but not yet identified as a rank of this run
        self._strangers: list[Connection] = []
        self._named: list[int] = []
        self._own_failure: str | None = None
        # whose, what, and until when a rank's death would explain it
        self._failure: tuple[int, Verdict, float] | None = None
        self._verdict: Verdict | None = None
        self._is_told = False
        self._is_closing = False
        self._next_beat = 0.0
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="sftmix-watch", daemon=True)

    def start(self) -> None:
        """Starts the heartbeat thread."""
        self._words = LastWords(self._folder, self.rank, self._token)
        if self._launchers is None:
            self._launchers = processes.launchers()
        if self._launchers and self._launchers[0].pid == os.getppid():
            # Only here, because a shell that started this process in the background may end. If the
            # launcher ends before this line, the first beat notices.
            processes.die_with_parent()
        for sock in (self._wake_read, self._listener):
            if sock is not None:
                sock.setblocking(False)
        # A forked child would keep the connections open after this process is killed.
        os.register_at_fork(after_in_child=partial(_close_sockets_of, weakref.ref(self)))
        self._started = self._progressed = self._ticked = time.monotonic()
        self._progress: dict[int, Position] = {}
        self._thread.start()

    def fail(self, text: str) -> NoReturn:
        """Ends all ranks with this cause, unless a rank's death explains it. Of several causes the
        first is used."""
        if self._own_failure is None:
            self._own_failure = text
        self._wake()
        if self._thread.is_alive():
            # it ends the process
            self._thread.join(GRACE_SECONDS + ALONE_SECONDS + self._silent_seconds)
        self._words.print_once(self._describe_failure())
        end(self.exit_code)

    def close(self) -> None:
        """Ends the heartbeat. The others do not treat the silence as a failure."""
        self._is_closing = True
        self._wake()
        self._thread.join(GOODBYE_SECONDS + self._silent_seconds)
        if not self._thread.is_alive():  # or `on_beat` hangs; the thread ends with the process
            self._close_sockets()
            self._words.forget()

    # The thread.

    def _run(self) -> None:
        try:
            while self._verdict is None:
                is_beat = self._wait()
                now = time.monotonic()
                self._judge(now, is_beat)
                if (
                    self._is_closing
                    and self._verdict is None
                    and self._failure is None
                    and self._own_failure is None
                ):
                    self._say_goodbye()
                    if self._verdict is None:
                        return
        except BaseException as error:  # without this thread a hang of the rank would go unnoticed
            self._verdict = Verdict(
                f"{self._member} cannot watch the others: {error!r}", self.exit_code
            )
        self._stop(self._verdict)

    def _wait(self) -> bool:
        """Handles messages until the next beat, or until there is something to decide. Returns
        whether a beat was sent."""
        now = time.monotonic()
        is_beat = now >= self._next_beat
        if is_beat:
            self._next_beat = now + self._interval
            self._beat()
        with selectors.PollSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            if self._listener is not None:
                selector.register(self._listener, selectors.EVENT_READ, None)
            for line in self._lines():
                selector.register(line.sock, selectors.EVENT_READ, line)
            selector.select(max(0.0, min(self._next_beat - time.monotonic(), LONGEST_WAIT_SECONDS)))
        with suppress(BlockingIOError):
            self._wake_read.recv(4096)
        if self._listener is not None:
            with suppress(OSError):  # not connected, or disconnected
                while True:
                    self._strangers.append(Connection(self._listener.accept()[0]))
        # read everything: a living rank's lines must be counted before its silence is judged
        self._receive()
        return is_beat

    def _beat(self) -> None:
        """Calls `on_beat`, and sends a line to all peers."""
        if self.world_size > 1:
            self._words.watch_itself(self._silent_seconds * ITSELF_FACTOR)
        if self._on_beat is not None and self._own_failure is None:
            try:
                self._on_beat()
            except BaseException as error:
                self._own_failure = self._own_failure or f"{type(error).__name__}: {error}"
        if self.rank > 0 and 0 not in self._peers and 0 not in self._left and not self._strangers:
            self._connect()
        beat: Message = {"beat": astuple(self.progress.position)}
        if self.rank == 0:
            beat["named"] = sorted(rank for rank, peer in self._peers.items() if peer.line.is_open)[
                :NUM_NAMED
            ]
        for peer in self._peers.values():
            peer.line.send(beat)

    def _connect(self) -> None:
        assert self._address is not None, "ranks other than 0 need the address of rank 0"
        with suppress(OSError):  # not listening yet: the next beat tries again
            line = Connection(
                socket.create_connection(self._address, timeout=max(self._interval, 0.5))
            )
            line.send({"token": self._token, "member": asdict(self._member)})
            self._strangers.append(line)

    def _receive(self) -> None:
        for line in list(self._strangers):
            self._welcome(line)
        for rank, peer in list(self._peers.items()):
            for message in peer.line.receive():
                self._handle(rank, peer, message)
            if rank in self._left:
                peer.line.close()
                del self._peers[rank]

    def _welcome(self, line: Connection) -> None:
        """Accepts a connection once it has introduced itself; closes it if it is not of this
        run."""
        messages = line.receive()
        if messages:
            self._strangers.remove(line)
            known = hmac.compare_digest(
                str(messages[0].get("token")).encode(errors="replace"), self._token.encode()
            )
            member = member_of(messages[0].get("member")) if known else None
            expected = range(1, self.world_size) if self.rank == 0 else range(1)
            if member is None or member.rank not in expected or member.rank in self._peers:
                line.close()
                return
            peer = self._peers[member.rank] = Peer(member, line, Position("start"))
            if self.rank == 0:
                line.send({"token": self._token, "member": asdict(self._member)})
            for message in messages[1:]:
                self._handle(member.rank, peer, message)
            return
        if not line.is_open or time.monotonic() - line.heard > self._silent_seconds:
            line.close()
            self._strangers.remove(line)

    def _handle(self, rank: int, peer: Peer, message: Message) -> None:
        match message:
            case {"beat": [str(phase), int(step), int(ticks)], **rest}:
                peer.position = Position(phase, step, ticks)
                if rank == 0:
                    self._named = [int(r) for r in rest.get("named", [])]
            case {"fail": str(cause), "code": int(code)} if self._failure is None:
                self._failure = (rank, Verdict(cause, code), time.monotonic() + GRACE_SECONDS)
            case {"verdict": {"cause": str(cause), "code": int(code), "silent": silent}} if (
                self._verdict is None
            ):
                self._verdict, self._is_told = Verdict(cause, code, member_of(silent)), True
            case {"bye": _}:
                self._left.add(rank)

    # Judgement.

    def _judge(self, now: float, is_beat: bool) -> None:
        """Sets the verdict if there is a cause."""
        if self._own_failure is not None and self._failure is None:
            self._report_failure(now)
        stood_still, self._ticked = now - self._ticked, now
        if stood_still > max(self._silent_seconds / 4, 2 * LONGEST_WAIT_SECONDS):
            # This process or the whole machine was suspended: messages of the others in that time
            # prove nothing.
            for peer in self._peers.values():
                peer.line.heard = now
            self._progressed = now
        if self._verdict is not None:
            return
        failed = self._failure[0] if self._failure is not None else None
        for peer in self._peers.values():
            where = f"in {peer.position}"
            if not peer.line.is_open:
                if peer.member.rank != failed:
                    self._set(
                        f"{peer.member} died {where}. What it printed, or the kernel's log (out of"
                        " memory), may say why."
                    )
                    return
            elif now - peer.line.heard > self._silent_seconds:
                self._set(
                    f"{peer.member} has not answered for {self._silent_seconds:g} s {where}."
                    f" Stacks: {self._words.folder}.",
                    peer.member,
                )
                return
        if self._failure is not None and now >= self._failure[2]:
            self._verdict = self._failure[1]
        elif is_beat:
            self._judge_slowly(now)

    def _judge_slowly(self, now: float) -> None:
        """The checks that are not urgent: launchers, ranks that never connected, progress."""
        for launcher in self._launchers or ():
            if not launcher.is_running:
                self._set(
                    f"the launcher of {self._member} is gone (pid {launcher.pid}:"
                    f" {launcher.command[:120]}). The run ends; start it again."
                )
                return
        missing = [
            r
            for r in (range(1, self.world_size) if self.rank == 0 else range(1 if self.rank else 0))
            if r not in self._peers and r not in self._left
        ]
        if missing and now - self._started > self._join_seconds:
            self._set(
                f"{_ranks(missing)} did not join within {self._join_seconds:g} s (seen by"
                f" {self._member}, address {self._address})."
            )
        progress = {self.rank: self.progress.position} | {
            r: p.position for r, p in self._peers.items()
        }
        if progress != self._progress:
            self._progress, self._progressed = progress, now
        elif self.rank == 0 and self._is_stalled(now):
            where = ", ".join(
                f"rank {r} in {position}" for r, position in sorted(progress.items())[:NUM_NAMED]
            )
            self._set(
                f"no progress for {self._stall_seconds:g} s ({where}). Stacks:"
                f" {self._words.folder}."
            )

    def _is_stalled(self, now: float) -> bool:
        limit = self._stall_seconds
        return self.progress.can_stall and limit is not None and now - self._progressed > limit

    def _report_failure(self, now: float) -> None:
        """Reports this rank's failure to rank 0, which decides; without rank 0 this rank
        decides."""
        verdict = Verdict(self._describe_failure(), self.exit_code)
        if self.rank == 0 or 0 in self._left:
            self._failure = (self.rank, verdict, now + (GRACE_SECONDS if self._peers else 0.0))
        elif (
            now - self._started > ALONE_SECONDS or self._peers
        ):  # a rank that fails immediately must still connect
            for peer in self._peers.values():
                peer.line.send({"fail": verdict.cause, "code": verdict.code})
            self._failure = (self.rank, verdict, now + (ALONE_SECONDS if self._peers else 0.0))

    def _describe_failure(self) -> str:
        return (
            f"{self._member} failed in {self.progress.position}:"
            f" {(self._own_failure or '')[:16384]}"
        )

    def _set(self, cause: str, silent: Member | None = None) -> None:
        self._verdict = Verdict(cause, self.exit_code, silent)

    # Ends.

    def _stop(self, verdict: Verdict) -> NoReturn:
        """Ends this process. Rank 0 prints before it tells the others, because their end may make a
        launcher end rank 0."""
        try:
            silent = verdict.silent
            if not self._is_told:
                cut_off = (
                    silent.rank if silent is not None and not silent.is_on(self._place) else None
                )
                self._words.print_once(verdict.cause, after_seconds=self._turn(), cut_off=cut_off)
            if (
                silent is not None
                and silent.start is not None
                and silent.rank != self.rank
                and silent.is_on(self._place)
            ):
                end_silent(
                    processes.Process(silent.pid, silent.start),
                    ask_for_stacks=self._is_told or self._turn() == 0.0,
                )
            told = [
                peer.line for peer in self._peers.values() if self.rank == 0 and peer.line.is_open
            ]
            for line in told:
                line.send({"verdict": asdict(verdict)})
            self._words.write_stacks(verdict.cause)
            # when rank 0 ends, a launcher may end the others before they have written their stacks
            self._await_end(told, GRACE_SECONDS)
        finally:
            end(verdict.code)

    def _turn(self) -> float:
        """Returns how many seconds this rank waits for others to print the cause."""
        if self.rank == 0 or self._failure is not None:
            return 0.0
        return (
            min(GRACE_SECONDS, 0.3 * self._named.index(self.rank))
            if self.rank in self._named
            else GRACE_SECONDS
        )

    def _say_goodbye(self) -> None:
        """Says goodbye: rank 0 closes the connection in answer, and so do the others to rank 0."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        # A rank that ends at once may leave before rank 0 has answered its introduction. Without a
        # goodbye rank 0 would take it for dead.
        unanswered = self._strangers if self.rank > 0 else []
        for line in [*unanswered, *(peer.line for peer in self._peers.values())]:
            line.send({"bye": True})
        deadline = time.monotonic() + GOODBYE_SECONDS
        while (self._peers or unanswered) and self._verdict is None and time.monotonic() < deadline:
            self._receive()
            for rank in [r for r, peer in self._peers.items() if not peer.line.is_open]:
                del self._peers[rank]
            time.sleep(0.01)

    def _await_end(self, lines: list[Connection], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(line.is_open for line in lines):
            for line in lines:
                line.send()
                line.receive()
            time.sleep(0.01)

    def _lines(self) -> list[Connection]:
        return [
            line
            for line in [*self._strangers, *(peer.line for peer in self._peers.values())]
            if line.is_open
        ]

    def _wake(self) -> None:
        with suppress(OSError):
            self._wake_write.send(b".")

    def _close_sockets(self) -> None:
        for line in [*self._strangers, *(peer.line for peer in self._peers.values())]:
            line.sock.close()
        for sock in (self._wake_read, self._wake_write, self._listener):
            if sock is not None:
                sock.close()


def _close_sockets_of(watch: weakref.ref[Watch]) -> None:
    if (found := watch()) is not None:
        found._close_sockets()


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (
        f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    )
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
