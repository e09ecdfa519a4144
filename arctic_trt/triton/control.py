"""The line from ``arctic_bls`` to ``arctic``, for what Triton's BLS cannot do: cancel a request, and notice that nobody answers.

A request that says so would wait in the queue. The two models' processes share a parent, the server; a socket is named after it,
in a directory that is this user's alone.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from arctic_trt.errors import RefusedError

LONGEST_ID = 4096


def control_path(server: int) -> Path:
    """Where the ``arctic`` of the server with the process id ``server`` listens; makes the directory."""
    directory = Path(tempfile.gettempdir()) / f"arctic-trt-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RefusedError(f"{directory} can be written by others.", "Remove it, or set TMPDIR to another directory.")
    return directory / f"{server}.sock"


class Listener:
    """Calls ``on_cancel`` with each request id that is sent to ``path``, from threads of its own."""

    def __init__(self, path: Path, on_cancel: Callable[[str], None]) -> None:
        self._path = path
        self._on_cancel = on_cancel
        path.unlink(missing_ok=True)  # of an earlier process with the same id
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._accept, name="lines", daemon=True).start()

    def close(self) -> None:
        """Nobody can connect any more."""
        self._path.unlink(missing_ok=True)
        self._socket.shutdown(socket.SHUT_RDWR)  # which ends the thread that accepts

    def _accept(self) -> None:
        with self._socket, suppress(OSError):
            while True:
                line, _ = self._socket.accept()
                threading.Thread(target=self._listen, args=(line,), name="line", daemon=True).start()

    def _listen(self, line: socket.socket) -> None:
        with line, suppress(OSError):
            while request_id := line.recv(LONGEST_ID).decode():
                self._on_cancel(request_id)


class Line:
    """To the listener at ``path``, of which each life has a line of its own."""

    def __init__(self, path: Path) -> None:
        """Connect; a line to nobody is not alive."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connected = True
        try:
            self._socket.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            self._connected = False

    @property
    def alive(self) -> bool:
        """Whether the one who listened is still there."""
        if not self._connected:
            return False
        try:
            return bool(self._socket.recv(1, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def cancel(self, request_id: str) -> None:
        """Ask for the end of ``request_id``; one who is gone has nothing to cancel."""
        with suppress(OSError):
            self._socket.send(request_id.encode())
