"""A tiny Arctic on two ranks, served by a real tritonserver through the command line, and what clients ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tests.support.engines import ROOT, mpi_environ

RANKS, BATCH = 2, 8
TOKENIZER = ROOT / "tests" / "data" / "tiny-arctic"
LIMITS = ("--max_batch_size", BATCH, "--max_seq_len", 4096)
START_S, END_S, ANSWER_S = 90.0, 60.0, 60.0
PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")


@dataclass(frozen=True)
class Answer:
    """What HTTP said: JSON objects, one unless it streamed."""

    status: int
    parts: list[dict[str, Any]]

    @property
    def text(self) -> str:
        return "".join(part["text_output"] for part in self.parts)

    @property
    def token_ids(self) -> list[int]:
        return [token for part in self.parts for token in listed(part["output_token_ids"])]

    @property
    def error(self) -> str:
        """The sentence of an answer that is nothing else."""
        (part,) = self.parts
        return str(part["error"])


@dataclass(frozen=True)
class Server:
    """A server that runs; ``pid`` is the command's process."""

    pid: int
    http_port: int
    grpc_port: int
    metrics_port: int
    openai_port: int
    log: Path

    def ask(self, model: str = "arctic_bls", *, stream: bool = False, **body: Any) -> Answer:
        """``generate``, or ``generate_stream``."""
        data = json.dumps({**body, **({"stream": True} if stream else {})}).encode()
        return self.post(f"/v2/models/{model}/generate" + "_stream" * stream, data)

    def post(self, path: str, data: bytes) -> Answer:
        with self.connected() as connection:
            connection.request("POST", path, data)
            response = connection.getresponse()
            said = response.read().decode()
        streams = response.getheader("Content-Type", "").startswith("text/event-stream")
        return Answer(response.status, events(said) if streams else [json.loads(said)])

    @contextmanager
    def connected(self) -> Iterator[HTTPConnection]:
        connection = HTTPConnection("127.0.0.1", self.http_port, timeout=ANSWER_S)
        try:
            yield connection
        finally:
            connection.close()

    def is_ready(self) -> bool:
        with self.connected() as connection, suppress(OSError, HTTPException):
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        return False

    def metric(self, name: str) -> float:
        connection = HTTPConnection("127.0.0.1", self.metrics_port, timeout=ANSWER_S)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    def ranks(self) -> list[int]:
        """Process ids of the engine's ranks, in their order."""
        return [pid for pid in descendants(self.pid) if b"\0service\0" in (line := command_line(pid)) and b"\0-n\0" not in line]


def events(said: str) -> list[dict[str, Any]]:
    """The objects of a stream of events."""
    return [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]


def listed(value: Any) -> list[Any]:
    """Triton prints an array of one item as that item."""
    return value if isinstance(value, list) else [value]


def wait_until(condition: Callable[[], object], patience_s: float, why: str) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"{why}: not within {patience_s:.0f} s"
        time.sleep(0.05)


def build_tiny_arctic(directory: Path) -> Path:
    """The trained tiny Arctic as an engine of :data:`RANKS` ranks."""
    words = ["--model_dir", TOKENIZER, "--output_dir", directory / "checkpoint", "--tp_size", RANKS, "--calib_size", 8]
    arctic_trt("quantize", *words, "--no_report")
    arctic_trt(
        "build", "--checkpoint_dir", directory / "checkpoint", "--output_dir", directory / "engine", "--backend", "torch", *LIMITS
    )
    return directory / "engine"


def arctic_trt(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "arctic_trt", *map(str, words), "-q"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def start_server(engine_dir: Path, directory: Path, *flags: object) -> tuple[subprocess.Popen[bytes], Server]:
    """Begin to serve ``engine_dir`` on free ports; it may not be ready yet."""
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    words = ["triton", engine_dir, "--tokenizer_dir", TOKENIZER, "--model_repo", directory / "repository", "--serve"]
    words += [word for name, port in ports.items() for word in (f"--{name}", port)]
    log = directory / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "arctic_trt", *map(str, (*words, *flags))],
            cwd=ROOT,
            env=mpi_environ(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    return process, Server(process.pid, log=log, **ports)


@contextmanager
def serving(engine_dir: Path, directory: Path, *flags: object) -> Iterator[tuple[subprocess.Popen[bytes], Server]]:
    """A server that is ready; ended as an operator ends it, and killed with all its processes if that does not help."""
    process, server = start_server(engine_dir, directory, *flags)
    try:
        wait_until(lambda: server.is_ready() or process.poll() is not None, START_S, "the server's readiness")
        assert process.poll() is None, server.log.read_text()
        yield process, server
    finally:
        family = descendants(process.pid)
        process.terminate()
        try:
            process.wait(END_S)
        finally:
            for pid in family:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def descendants(root: int) -> list[int]:
    """``root`` and the processes below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = [root], [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        found += new
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
