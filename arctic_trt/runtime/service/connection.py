"""The leader's end of the socket: lines in as they come, lines out without waiting for whoever reads them."""

from __future__ import annotations

import json
import logging
import queue
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

READ_BYTES = 1 << 18

logger = logging.getLogger(__name__)


class Connection:
    """A socket to rank 0; messages are sent from a thread of their own, in the order of :meth:`send`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest = b""
        # one for all: results of that size, each shrunk to a line, would leave the heap in pieces, a little more each time
        self._received = memoryview(bytearray(READ_BYTES))
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        threading.Thread(target=self._write, name="calls to the ranks", daemon=True).start()

    def send(self, line: bytes) -> None:
        """Send a line, sooner or later; nothing happens if nobody is left to read it."""
        self._outbox.put(line)

    def say_goodbye(self) -> None:
        """After all lines, let the other end know that no more come."""
        self._outbox.put(None)

    def receive(self, wait_s: float) -> Iterator[dict[str, Any]] | None:
        """The messages that have come, after at most ``wait_s``; None when the other end is gone."""
        if not self._poll.poll(wait_s * 1000):
            return iter(())
        try:
            data = self._received[: self._sock.recv_into(self._received)].tobytes()
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return map(json.loads, lines)

    def close(self) -> None:
        """Also wakes the thread that sends."""
        self._outbox.put(None)
        self._shut_down(socket.SHUT_RDWR)
        self._sock.close()

    def _write(self) -> None:
        try:
            while (line := self._outbox.get()) is not None:
                self._sock.sendall(line)
        except OSError as error:  # whoever receives notices too
            logger.debug("The ranks' socket broke: %s", error)
        self._shut_down(socket.SHUT_WR)

    def _shut_down(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError as error:
            logger.debug("The ranks' socket is closed: %s", error)
