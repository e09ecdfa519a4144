"""The line between ``arctic`` and ``arctic_bls``, beside Triton: news of requests one way, ids of those to cancel the other way.

Triton's BLS cannot cancel, a request that says so would wait in the queue, and a response between two models costs more than all
the rest. The two models' processes share a parent, the server; a socket is named after it, in a directory that is this user's
alone. A line carries a JSON text a line, ids as they are.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from arctic_trt.errors import RefusedError

HELLO = b"\n"
PATIENCE_S = 30
"""For one who does not read."""

News = Mapping[str, Any]
"""Something about each of some requests, by their ids."""


def control_path(server: int) -> Path:
    """Where the ``arctic`` of the server with the process id ``server`` listens; makes the directory."""
    directory = Path(tempfile.gettempdir()) / f"arctic-trt-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RefusedError(f"{directory} can be written by others.", "Remove it, or set TMPDIR to another directory.")
    return directory / f"{server}.sock"


class Listener:
    """At ``path``; calls ``on_cancel`` with each request id that it hears, and ``on_end`` when a line ends, from own threads."""

    def __init__(self, path: Path, on_cancel: Callable[[str], None], on_end: Callable[[], None]) -> None:
        self._path = path
        self._on_cancel = on_cancel
        self._on_end = on_end
        self._lines: list[socket.socket] = []
        self._lock = threading.Lock()
        path.unlink(missing_ok=True)  # of an earlier process with the same id
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._accept, name="lines", daemon=True).start()

    def tell(self, news: News) -> None:
        """Tell ``news`` to whoever listens; one who does not read for long is not told any more."""
        data = json.dumps(news, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            for line in list(self._lines):
                try:
                    line.sendall(data)
                except OSError:
                    self._lines.remove(line)
                    _hang_up(line)

    def close(self) -> None:
        """End all lines; nobody can connect any more."""
        self._path.unlink(missing_ok=True)
        _hang_up(self._socket)  # which ends the thread that accepts
        with self._lock:
            for line in self._lines:
                _hang_up(line)

    def _accept(self) -> None:
        with self._socket, suppress(OSError):
            while True:
                line, _ = self._socket.accept()
                line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", PATIENCE_S, 0))
                with self._lock:
                    line.sendall(HELLO)  # whoever has heard this misses nothing
                    self._lines.append(line)
                threading.Thread(target=self._listen, args=(line,), name="line", daemon=True).start()

    def _listen(self, line: socket.socket) -> None:
        with suppress(OSError), line.makefile("rb") as ids:
            for request_id in ids:
                self._on_cancel(request_id.decode().rstrip("\n"))
        self._on_end()


class Line:
    """To the listener at ``path``, for as long as it lives; calls ``on_news`` from a thread of its own."""

    def __init__(self, path: Path, on_news: Callable[[News], None]) -> None:
        """Connect; a line to nobody is not alive."""
        self.alive = False
        """Whether the one who listens is still there."""
        self._on_news = on_news
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        with suppress(OSError):
            self._socket.settimeout(PATIENCE_S)
            self._socket.connect(str(path))
            self.alive = self._socket.recv(len(HELLO)) == HELLO
            self._socket.settimeout(None)
        if self.alive:
            threading.Thread(target=self._listen, name="line", daemon=True).start()
        else:
            self._socket.close()

    def cancel(self, request_id: str) -> None:
        """Ask for the end of ``request_id``; one who is gone has nothing to cancel."""
        with self._lock, suppress(OSError):
            self._socket.sendall(request_id.encode() + b"\n")

    def close(self) -> None:
        """Hang up."""
        _hang_up(self._socket)

    def _listen(self) -> None:
        try:
            with self._socket, self._socket.makefile("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else it broke off
                        self._on_news(json.loads(line))
        except OSError:
            return
        finally:
            self.alive = False


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()
