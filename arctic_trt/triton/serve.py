"""One server from its start to its end: tritonserver and the OpenAI front end, supervised, drained, and nothing left behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from arctic_trt.errors import ArcticTrtError
from arctic_trt.triton.admin import Admin
from arctic_trt.triton.janitor import Janitor
from arctic_trt.triton.names import ENGINE, GATE, POSTPROCESSING, PREPROCESSING
from arctic_trt.triton.server import (
    Endpoints,
    Run,
    TritonServer,
    check_packages,
    check_ports,
    check_shared_memory,
    check_stub,
    locate_server,
    name_run,
    server_command,
    server_environ,
    why_not_free,
)
from arctic_trt.triton.server_log import ServerLog
from arctic_trt.triton.stubs import Reviver

GATEWAY = (sys.executable, "-m", "arctic_trt", "gateway")
LOOK_S = 0.1
GRACE_S = 15.0
"""What ending takes besides waiting for requests: ranks leave, models unload."""
CONNECTIONS_S = 2.0
PORTS_S = 10.0
"""How long what is left of a killed server may keep its ports."""
SHORT_LIFE_S = 5.0
"""A front end that ends sooner after its start would end again."""

STAGES = frozenset({PREPROCESSING, ENGINE, POSTPROCESSING, GATE})
"""Models that others are in front of."""
LAST_WORDS_S = 2.0
STDERR = 2
"""Where the front end may speak: stdout belongs to the command's result."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What to serve, where, and for how long requests may go on once the end has been asked for.

    ``gateway`` are the options of the OpenAI front end, which it reads from stdin: an API key on a command line would be
    everybody's.
    """

    model_repo: Path
    ranks: int
    endpoints: Endpoints
    gateway: Mapping[str, Any] = field(repr=False)
    drain_timeout_s: int = 30


class Watch(Protocol):
    """Who is told how the server fares."""

    def model(self, name: str, loaded: bool) -> None:
        """A model begins to load, or has loaded."""

    def waiting(self) -> None:
        """Called again and again until everything answers."""

    def ready(self) -> None:
        """Everything answers."""

    def draining(self) -> None:
        """The end was asked for; requests under way go on."""


def check_serving(options: ServeOptions, environ: Mapping[str, str] = os.environ) -> TritonServer:
    """The server that would be started, after a look at everything it needs; raises :class:`RefusedError` naming what is not."""
    server = locate_server()
    check_packages()
    check_stub(server.stub, server_environ(environ, Run("", Path(), ""), options.endpoints))
    check_ports(options.endpoints)
    check_shared_memory(options.ranks)
    return server


def serve(server: TritonServer, options: ServeOptions, watch: Watch) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Of the main thread alone, since signals go there.

    Raises :class:`ArcticTrtError` with the server's last words when it ends by itself, or does not end in time, and
    :class:`KeyboardInterrupt` for a signal before the server is ready, or a second one while it drains.
    """
    with _open_run() as run, _Signals() as signals:
        supervisor = _Supervisor(server, options, run, watch, signals.asked)
        try:
            supervisor.start()
            signals.patient = True
            watch.ready()
            supervisor.attend()
            watch.draining()
            supervisor.drain()
        finally:
            supervisor.abandon()


class _Signals:
    """While ``patient``, the first SIGTERM or SIGINT sets ``asked``; any other is a :class:`KeyboardInterrupt`."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.patient or self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()


@contextmanager
def _open_run() -> Iterator[Run]:
    """A run with its folders; at the end, however it comes, the janitor deletes them and kills what is left."""
    name = name_run()
    run = Run(name, Path(tempfile.mkdtemp(prefix=f"{name}-")), os.urandom(16).hex())
    with ExitStack() as stack:
        stack.callback(Janitor(name, run.directory).finish)
        run.mpi_directory.mkdir()
        yield run


class _Supervisor:
    """The two processes of a server: tritonserver, with which everything ends, and the front end, which can be replaced."""

    def __init__(self, server: TritonServer, options: ServeOptions, run: Run, watch: Watch, asked: threading.Event) -> None:
        self._options, self._watch, self._asked = options, watch, asked
        self._environ = server_environ(os.environ, run, options.endpoints)
        endpoints = options.endpoints
        self._admin = Admin(endpoints.address(endpoints.http_port), run.key)
        self._front = Admin(endpoints.address(endpoints.openai_port), "")
        backends = make_backends(server, run.directory / "backends")
        self._command = server_command(server, options.model_repo, backends, endpoints, run, options.drain_timeout_s)
        self._start_triton()
        self._gateway: subprocess.Popen[str] | None = None
        self._gateway_since = 0.0

    def start(self) -> None:
        """Wait until both answer, and for their processes from then on."""
        self._wait_for(self._admin.is_ready)
        self._start_gateway()
        self._wait_for(lambda: self._front.is_ready("/health"))

    def attend(self) -> None:
        """Return when the end is asked for."""
        self._reviver.start()
        try:
            while not self._asked.wait(LOOK_S):
                self._look()
                if self._reviver.gave_up.is_set():
                    self._start_again()
        finally:
            self._reviver.stop()

    def _start_triton(self) -> None:
        self._log = ServerLog(self._watch.model)
        self._triton = self._spawn(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._reader = threading.Thread(target=self._log.follow, args=(self._triton.stdout,), daemon=True)
        self._reader.start()
        self._reviver = Reviver(self._triton.pid, self._admin)

    def _start_again(self) -> None:
        """Another tritonserver for one that cannot get a model back; clients whose requests were lost see it go."""
        logger.warning(
            "Requests were lost with the model's process, which cannot be loaded again: starting another tritonserver."
        )
        ports = [port for name, port in self._options.endpoints.ports.items() if name != "openai_port"]
        self._triton.kill()
        self._triton.wait()
        until = time.monotonic() + PORTS_S
        while any(why_not_free(self._options.endpoints.host, port) for port in ports) and time.monotonic() < until:
            time.sleep(LOOK_S)
        self._start_triton()
        self._wait_for(self._admin.is_ready)
        self._reviver.start()
        logger.info("The new tritonserver is ready.")

    def drain(self) -> None:
        """End both, the front end first: what it has under way needs the server."""
        patience_s = self._options.drain_timeout_s + GRACE_S
        assert self._gateway
        self._gateway.terminate()
        try:
            self._gateway.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise ArcticTrtError(f"the OpenAI front end did not end within {patience_s:.0f} s, and was killed.") from None
        if not self._unload(time.monotonic() + patience_s) and not self._reviver.revived:
            raise ArcticTrtError(f"tritonserver did not end within {patience_s:.0f} s, and was killed.")
        self._triton.terminate()
        # without models nothing is under way, but the server would wait for clients that keep their connections
        with suppress(subprocess.TimeoutExpired):
            self._triton.wait(CONNECTIONS_S)

    def _unload(self, until: float) -> bool:
        """Unload all models, those first that others are behind; returns whether their requests had ended in time."""
        try:
            for last in (STAGES, frozenset()):
                unloading = self._admin.loaded() - last
                for model in sorted(unloading):
                    self._admin.unload(model)
                while self._admin.loaded() & unloading:
                    if time.monotonic() > until:
                        return False
                    time.sleep(LOOK_S)
        except ArcticTrtError:
            if self._triton.poll() is not None:
                raise self._ended() from None
            raise
        return True

    def abandon(self) -> None:
        """Kill what still runs; the janitor does the same to their children."""
        for process in filter(None, (self._gateway, self._triton)):
            process.kill()
            process.wait()

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._look()
            self._watch.waiting()
            time.sleep(LOOK_S)

    def _look(self) -> None:
        if self._triton.poll() is not None:
            raise self._ended()
        if self._gateway and self._gateway.poll() is not None:
            how = describe_end(self._gateway.returncode)
            if time.monotonic() - self._gateway_since < SHORT_LIFE_S:
                raise ArcticTrtError(f"The OpenAI front end {how} right after its start.", "What it wrote is above.")
            logger.warning("The OpenAI front end %s; starting it again.", how)
            self._start_gateway()

    def _start_gateway(self) -> None:
        self._gateway = self._spawn(GATEWAY, stdin=subprocess.PIPE, stdout=STDERR)
        self._gateway_since = time.monotonic()
        assert self._gateway.stdin
        with self._gateway.stdin as stdin, suppress(BrokenPipeError):  # that it ended is seen to elsewhere
            json.dump(dict(self._options.gateway), stdin)

    def _spawn(self, command: Sequence[str], **streams: Any) -> subprocess.Popen[str]:
        # A session of its own: Ctrl-C reaches this process alone, which ends the others in order.
        return subprocess.Popen(command, env=self._environ, start_new_session=True, text=True, errors="replace", **streams)

    def _ended(self) -> ArcticTrtError:
        self._reader.join(LAST_WORDS_S)  # stubs may keep its output open for a while
        words = self._log.last_words()
        how = describe_end(self._triton.returncode)
        return ArcticTrtError(f"tritonserver {how}: {words}" if words else f"tritonserver {how}, and did not say why.")


def make_backends(server: TritonServer, directory: Path) -> Path:
    """Make ``directory`` a --backend-directory of links to the parts of the server's Python backend."""
    (directory / "python").mkdir(parents=True)
    for part in (server.library, server.utilities, server.stub):
        (directory / "python" / part.name).symlink_to(part)
    return directory


def describe_end(code: int) -> str:
    """``ended with exit code 1``, or ``was ended by SIGKILL`` for a negative ``code`` as of :class:`subprocess.Popen`."""
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
