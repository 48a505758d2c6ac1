"""JSON lines over a TCP socket that never blocks."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

LONGEST_LINE = 1 << 18  # bytes; a longer line does not come from a rank of this run

Message = dict[str, Any]


class Connection:
    """is_open: False after the other side closed, was cut off or sent invalid JSON. heard: time of
    its last line."""

    def __init__(self, sock: socket.socket):
        self.sock = sock
        self.is_open = True
        self.heard = time.monotonic()
        self._received = b""
        self._to_send = b""
        sock.setblocking(False)

    def send(self, message: Message | None = None) -> None:
        """Sends a message, after what the socket did not accept before."""
        if message is not None:
            self._to_send += json.dumps(message).encode() + b"\n"
        try:
            while self._to_send:
                self._to_send = self._to_send[self.sock.send(self._to_send) :]
        except OSError:
            # full: the next call continues; broken: `receive` notices, after the lines already sent
            return

    def receive(self) -> list[Message]:
        """Returns all complete messages and keeps incomplete lines; does not wait."""
        while self.is_open:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.is_open = bool(data)
            self._received += data
            if len(self._received) > LONGEST_LINE and b"\n" not in self._received:
                self.is_open = False
        *lines, self._received = self._received.split(b"\n")
        messages: list[Message] = []
        for line in lines:
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                self.is_open = False
                break
            messages.append(message)
        if messages:
            self.heard = time.monotonic()
        return messages

    def close(self) -> None:
        self.is_open = False
        self.sock.close()


def listen(host: str = "127.0.0.1") -> tuple[socket.socket, int]:
    """Returns a listening socket of an address of this machine ("" for all), and its port."""
    listener = socket.create_server(
        (host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
    )
    return listener, int(listener.getsockname()[1])
