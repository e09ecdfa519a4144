"""How ``arctic_bls`` cancels a request at ``arctic``: Triton's BLS cannot, and a request that says so would wait in the queue.

The two models' processes share a parent, the server; a socket is named after it, in a directory that is this user's alone.
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
    """Calls ``on_cancel`` with each request id that is sent to ``path``, from a thread of its own."""

    def __init__(self, path: Path, on_cancel: Callable[[str], None]) -> None:
        self._path = path
        self._on_cancel = on_cancel
        path.unlink(missing_ok=True)  # of an earlier process with the same id
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen, name="cancellations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        send_cancel(self._path, "")
        self._thread.join()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _listen(self) -> None:
        while request_id := self._socket.recv(LONGEST_ID).decode():
            self._on_cancel(request_id)


def send_cancel(path: Path, request_id: str) -> None:
    """Ask the listener at ``path`` to cancel ``request_id``; one that is gone has nothing to cancel."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(FileNotFoundError, ConnectionRefusedError):
        sender.sendto(request_id.encode(), str(path))
