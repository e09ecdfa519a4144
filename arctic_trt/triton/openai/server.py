"""The process that listens: one event loop, from the first connection until the last answer after the signal to stop."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from typing import Any

from arctic_trt.errors import RefusedError
from arctic_trt.triton.openai.options import OpenAiOptions

KEEP_ALIVE_S = 30


def run(options: OpenAiOptions) -> None:
    """Serve until SIGTERM or SIGINT, then finish the answers under way, and leave by ``SystemExit(0)``.

    Raises :class:`RefusedError` where the port cannot be listened on.
    """
    import uvicorn

    from arctic_trt.triton.openai.app import make_app
    from arctic_trt.triton.openai.triton_engine import TritonEngine

    for each in (signal.SIGTERM, signal.SIGINT):  # uvicorn repeats the signal to whoever had it before, once it is done
        signal.signal(each, _leave)
    listener = listen(options)
    engine = TritonEngine(options.grpc_url, options.triton_model)
    config = uvicorn.Config(
        make_app(options, engine),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(options.drain_timeout_s),
    )
    uvicorn.Server(config).run(sockets=[listener])


def listen(options: OpenAiOptions) -> socket.socket:
    """A socket that takes connections; raises :class:`RefusedError`."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise RefusedError(
            f"--openai_port {options.port} cannot be listened on at {options.host}: {os.strerror(error.errno or 0)}.",
            "End what listens there, or choose another one.",
        ) from None


def _leave(_: int, __: Any) -> None:
    sys.exit(0)
