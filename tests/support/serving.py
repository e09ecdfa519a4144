"""Servers under supervision, as processes that a test may signal and kill."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arctic_trt.triton.janitor import clear_up, find_processes
from arctic_trt.triton.server import MARK, SHARED_MEMORY, Endpoints

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0
DRIVER = """
import json, sys
from pathlib import Path
from arctic_trt.output import Output
from arctic_trt.triton import serve, stubs
from arctic_trt.triton.server import Endpoints, TritonServer

raw = json.loads(sys.argv[1])
serve.GATEWAY = raw["gateway_command"]
serve.GRACE_S = raw["grace_s"]
stubs.UNLOAD_S = 0.5
Output().configure_logging()

class Watch:
    def model(self, name, loaded): print(f"model {name} {loaded}", flush=True)
    def waiting(self): pass
    def ready(self): print("ready", flush=True)
    def draining(self): print("draining", flush=True)

options = serve.ServeOptions(model_repo=Path(raw["model_repo"]), ranks=1, endpoints=Endpoints("127.0.0.1", *raw["ports"]),
                             gateway=raw["gateway"], drain_timeout_s=1)
try:
    serve.serve(TritonServer(*map(Path, raw["server"])), options, Watch())
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    sys.exit(getattr(error, "exit_code", 99))
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true value of ``condition``."""
    give_up_at = time.monotonic() + patience_s
    while time.monotonic() < give_up_at:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {patience_s:.0f} s")


def free_ports(count: int = 4) -> list[int]:
    """Ports on which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def fake_server(directory: Path) -> tuple[str, ...]:
    """The files of a tritonserver that is :mod:`tests.support.fake_tritonserver`."""
    (directory / "bin").mkdir(parents=True)
    (directory / "backends" / "python").mkdir(parents=True)
    program = directory / "bin" / "tritonserver"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.support.fake_tritonserver "$@"\n')
    names = ("libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub")
    parts = [directory / "backends" / "python" / name for name in names]
    for part in parts:
        part.write_text("#!/bin/sh\n")
    for runnable in (program, parts[-1]):
        runnable.chmod(0o755)
    return tuple(map(str, (program, *parts)))


@dataclass
class Served:
    """A supervisor's process, and what it wrote."""

    process: subprocess.Popen[str]
    endpoints: Endpoints
    lines: list[str] = field(default_factory=list)
    run: str = ""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def wait_ready(self) -> Served:
        wait_until(lambda: self.said("ready") or self.process.poll() is not None, "readiness")
        assert self.said("ready"), self.lines
        self.run = self.name()
        return self

    def name(self) -> str:
        """The run's name, out of the environment of its tritonserver."""
        environ = Path(f"/proc/{self.children('tritonserver')[0]}/environ").read_bytes().split(b"\0")
        return next(word.decode().partition("=")[2] for word in environ if word.startswith(f"{MARK}=".encode()))

    def children(self, word: str, parent: int | None = None) -> list[int]:
        """The child processes whose command line has ``word``."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                ours = int((path / "stat").read_text().rpartition(")")[2].split()[1]) == (parent or self.process.pid)
                if ours and word.encode() in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    def end(self, number: int | None = None) -> int:
        """The exit code, perhaps after a signal; nothing of the run may be left by then."""
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def leftovers(self) -> list[str]:
        """Processes and files of the run that are still there."""
        temporary = Path(os.environ.get("TMPDIR", "/tmp")).glob(f"{self.run}*")
        return [*map(str, find_processes(self.run)), *map(str, SHARED_MEMORY.glob(f"{self.run}*")), *map(str, temporary)]

    def get(self, port: int, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """End everything, however the test went."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self.run:
            clear_up(self.run, Path("/nonexistent"))


def start_supervisor(directory: Path, *models: str, grace_s: float = 10.0, **gateway: Any) -> Served:
    """Serve ``models`` by the fake server; ``gateway`` are more options of the fake front end."""
    for model in models or ("arctic", "arctic_gate"):
        (directory / "models" / model).mkdir(parents=True)
    ports = free_ports()
    raw = {
        "gateway_command": [sys.executable, "-m", "tests.support.fake_gateway"],
        "grace_s": grace_s,
        "model_repo": str(directory / "models"),
        "ports": ports,
        "gateway": {"host": "127.0.0.1", "port": ports[3], **gateway},
        "server": fake_server(directory / "server"),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps(raw)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return Served(process, Endpoints("127.0.0.1", *ports))
