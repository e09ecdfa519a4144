"""Lines over a socket, whole and in order, and nobody who waits on a reader that does not read."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from arctic_trt.runtime.service.connection import Connection
from tests.support.waiting import wait_until


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    mine, theirs = socket.socketpair()
    connection = Connection(mine)
    with theirs:
        yield connection, theirs
        connection.close()


def test_messages_are_whole_however_they_come_in_pieces(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    sent = [{"n": n, "text": "é" * (n * n * 50)} for n in range(40)]
    data = b"".join(json.dumps(each, ensure_ascii=False).encode() + b"\n" for each in sent)
    draw = random.Random(1)

    def write() -> None:
        at = 0
        while at < len(data):
            at += theirs.send(data[at : at + draw.randrange(1, 20_000)])
        theirs.close()

    threading.Thread(target=write).start()
    received = []
    while (messages := connection.receive(1.0)) is not None:
        received += messages
    assert received == sent


def test_without_news_it_returns(ends: tuple[Connection, socket.socket]) -> None:
    began = time.monotonic()
    messages = ends[0].receive(0.05)
    assert messages is not None and not list(messages) and time.monotonic() - began >= 0.04


def test_sending_never_waits_and_keeps_the_order(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    began = time.monotonic()
    for n in range(2000):
        connection.send(json.dumps([n, "x" * 1000]).encode() + b"\n")
    assert time.monotonic() - began < 1, "though nobody reads"
    connection.say_goodbye()
    with theirs.makefile("rb") as lines:
        assert [json.loads(line)[0] for line in lines] == list(range(2000))
    assert connection.receive(0) is not None, "the other end may go on"


def test_closing_wakes_who_sends_to_nobody() -> None:
    mine, theirs = socket.socketpair()
    before = threading.active_count()
    connection = Connection(mine)
    connection.send(b"x" * 10_000_000)
    time.sleep(0.05)
    connection.close()
    assert wait_until(lambda: threading.active_count() == before, 5)
    theirs.close()


def test_an_end_that_breaks_off_is_an_end(ends: tuple[Connection, socket.socket]) -> None:
    connection, theirs = ends
    connection.send(b"unread\n")
    time.sleep(0.05)
    theirs.close()  # with something unread, which the other end notices as an error
    assert wait_until(lambda: connection.receive(0.05) is None, 5)
    connection.send(b"into nothing\n")


def test_all_that_comes_is_received_into_the_same_memory() -> None:
    """Memory of that size for each message, shrunk to a line, grew the process by a hundred bytes a request."""

    class Watched:
        def __init__(self, sock: socket.socket) -> None:
            self.sock, self.buffers = sock, set()

        def fileno(self) -> int:
            return self.sock.fileno()

        def recv_into(self, buffer: memoryview) -> int:
            self.buffers.add(id(buffer.obj))
            return self.sock.recv_into(buffer)

        def sendall(self, data: bytes) -> None:
            self.sock.sendall(data)

    ours, theirs = socket.socketpair()
    watched = Watched(ours)
    connection = Connection(watched)  # type: ignore[arg-type]
    for number in range(3):
        theirs.sendall(json.dumps({"id": number}).encode() + b"\n")
        assert list(connection.receive(1) or ()) == [{"id": number}]
    assert len(watched.buffers) == 1
    theirs.close()
