"""The processes of one life of a group: started together, heard through their last words, and ended together."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.launch import without_launcher

KINDS = {kind.exit_code: kind for kind in (UsageError, RefusedError)}
LAST_LINES = 40
COMPLAINT = re.compile(r"arctic-trt: error: (.*)")
MPI_COMPLAINT = re.compile(r"process rank (\d+) .*?exited on\s+signal \d+ \((\w+)", re.DOTALL)
POLL_S = 0.02
BACKING = "OMPI_MCA_btl_sm_backing_directory"

logger = logging.getLogger(__name__)


class RanksProcess:
    """What ``command`` starts, in a session of its own, so that none of it can get lost.

    ``command`` is given the path of a socket, to which rank 0 connects. It and whatever it starts die with the thread that
    creates this: the kernel ties a child to a thread.
    """

    def __init__(self, command: Callable[[Path], list[str]]) -> None:
        self._directories: list[Path] = []
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            path = self._make_directory() / "leader"
            self._listener.bind(str(path))
            self._listener.listen(1)
            self._listener.settimeout(POLL_S)
            self._process = subprocess.Popen(
                command(path),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environ(),
                start_new_session=True,
            )
        except OSError as error:
            self._remove_files()
            raise RefusedError(f"The ranks cannot be started ({error}).", "TMPDIR says where their socket lies.") from None
        self._listening = threading.Thread(target=self._listen, name="ranks' words", daemon=True)
        self._listening.start()

    def accept(self) -> socket.socket | None:
        """Rank 0's connection, None if it has not come within a moment."""
        try:
            return self._listener.accept()[0]
        except TimeoutError:
            return None

    @property
    def ended(self) -> bool:
        """The process that was started is gone; others of its session may be left."""
        return self._process.poll() is not None

    @property
    def pids(self) -> list[int]:
        """All processes of this life that still run."""
        return _session(self._process.pid)

    def end(self, patience_s: float) -> ArcticTrtError:
        """See to it that nothing is left, killing what is after ``patience_s``; returns why it ended, by its own words."""
        until = time.monotonic() + patience_s
        while not self.ended and time.monotonic() < until:
            time.sleep(POLL_S)
        killed = not self.ended
        while True:
            for pid in self.pids:
                _kill(pid)
            if self.ended and not self.pids:
                break
            time.sleep(POLL_S)
        self._listening.join()
        self._remove_files()
        return explain(self._process.returncode, list(self._lines), killed=killed)

    def _environ(self) -> dict[str, str]:
        """The ranks' files, and the memory that they share, lie where they are removed whatever becomes of the ranks."""
        environ = {**without_launcher(os.environ), "TMPDIR": str(self._directories[0]), "PYTHONUNBUFFERED": "1"}
        shared_memory = Path(environ.get(BACKING, "/dev/shm"))
        if os.access(shared_memory, os.W_OK):
            environ[BACKING] = str(self._make_directory(shared_memory))
        return environ

    def _make_directory(self, parent: Path | None = None) -> Path:
        self._directories.append(Path(tempfile.mkdtemp(prefix="arctic-trt-", dir=parent)))
        return self._directories[-1]

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as words:
            for line in words:
                text = line.decode(errors="replace").rstrip()
                self._lines.append(text)
                logger.log(logging.WARNING if text.startswith("WARNING") else logging.DEBUG, "ranks: %s", text)

    def _remove_files(self) -> None:
        self._listener.close()
        for directory in self._directories:
            shutil.rmtree(directory, ignore_errors=True)  # what is left is in nobody's way


def explain(code: int, lines: list[str], *, killed: bool) -> ArcticTrtError:
    """Why ranks ended, as the error that a command line with this exit code reports."""
    text = "\n".join(lines)
    if complaint := COMPLAINT.search(text):
        return KINDS.get(code, ArcticTrtError)(complaint[1])
    if complaint := MPI_COMPLAINT.search(text):
        return ArcticTrtError(f"Rank {complaint[1]} ended by a signal ({complaint[2]}).")
    if killed:
        return ArcticTrtError("The ranks had to be killed.")
    how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    last = next((line for line in reversed(lines) if line.strip(" -")), None)
    said = " and said nothing" if last is None else f"; the last that they said is: {last!r}"
    return ArcticTrtError(f"The ranks ended {how}{said}.")


def _session(leader: int) -> list[int]:
    """The processes of a session that run; zombies do not."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _stat(int(name))) is not None:
            state, _, _, session = stat[:4]
            if int(session) == leader and state != "Z":
                found.append(int(name))
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` after the name, None for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
