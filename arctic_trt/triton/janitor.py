"""What is left of a run is cleared up by a process that outlives its supervisor, even one that was killed.

The janitor knows a run by its name: processes carry it in their environment, files in /dev/shm begin with it. It reads what to
look after from stdin, a line of JSON, and begins when stdin ends, which it does with the supervisor.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from arctic_trt.triton.server import MARK, SHARED_MEMORY

PATIENCE_S, LOOK_S = 10.0, 0.02
QUIET_LOOKS = 3
"""A process that is just being started has no environment for a moment."""
PROC = Path("/proc")


class Janitor:
    """Start one for the run ``name`` with its temporary ``directory``; :meth:`finish` has it clear up now."""

    def __init__(self, name: str, directory: Path) -> None:
        environ = {key: value for key, value in os.environ.items() if key != MARK}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "arctic_trt.triton.janitor"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the supervisor
        )
        assert self._process.stdin
        self._process.stdin.write(f"{json.dumps([name, str(directory)])}\n".encode())
        self._process.stdin.flush()

    def finish(self) -> None:
        """Clear up, and return when it is done."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def clear_up(name: str, directory: Path, shared_memory: Path = SHARED_MEMORY) -> None:
    """Kill the processes of the run ``name``; delete its files in ``shared_memory``, and ``directory``."""
    give_up_at, quiet = time.monotonic() + PATIENCE_S, 0
    while quiet < QUIET_LOOKS and time.monotonic() < give_up_at:
        left = find_processes(name)
        quiet = 0 if left else quiet + 1
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(LOOK_S)
    for path in (*shared_memory.glob(f"{name}*"), directory):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def find_processes(name: str) -> list[int]:
    """The processes that were started with the mark of the run ``name`` in their environment, this one aside."""
    mark = f"{MARK}={name}".encode()
    found = []
    for path in PROC.glob("[0-9]*/environ"):
        with suppress(OSError):  # gone meanwhile, or another user's
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def main() -> None:
    """Wait for the end of stdin, whatever signals come meanwhile, and clear up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    name, directory = json.loads(sys.stdin.readline())
    sys.stdin.read()
    clear_up(name, Path(directory))


if __name__ == "__main__":
    main()
