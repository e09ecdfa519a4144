"""The process: it listens, drains at the signal, and leaves with 0."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.triton.openai.options import OpenAiOptions
from arctic_trt.triton.openai.server import listen
from tests.support.fake_triton import fake_triton
from tests.triton.openai.test_triton_engine import response

RUN = """
import sys
from arctic_trt.triton.openai.options import OpenAiOptions
from arctic_trt.triton.openai.server import run
run(OpenAiOptions(grpc_url=sys.argv[1], port=int(sys.argv[2]), drain_timeout_s=5))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            link = HTTPConnection("127.0.0.1", port, timeout=5)
            link.request("GET", "/health")
            assert link.getresponse().status == 200
            link.close()
            return
        except ConnectionError:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)


def slow(_: Any) -> Iterator[dict[str, Any]]:
    for number in range(10):
        yield response(f"{number} ", reasons=("stop" if number == 9 else "",))
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_answer_under_way_is_finished_and_the_process_leaves_with_0(number: signal.Signals) -> None:
    port = free_port()
    with fake_triton(slow) as (_, address):
        process = subprocess.Popen([sys.executable, "-c", RUN, address, str(port)], stderr=subprocess.PIPE)
        try:
            until_healthy(port, process)
            link = HTTPConnection("127.0.0.1", port, timeout=20)
            link.request("POST", "/v1/completions", b'{"prompt": "a", "stream": true}')
            answer = link.getresponse()
            os.kill(process.pid, number)
            text = answer.read()
            assert b'"9 "' in text and text.endswith(b"data: [DONE]\n\n")
            assert process.wait(10) == 0
            assert process.stderr and process.stderr.read() == b""
        finally:
            process.kill()
            process.communicate()


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            RefusedError, match=f"--openai_port {port} cannot be listened on at 127.0.0.1: Address already in use"
        ):
            listen(OpenAiOptions(grpc_url="a:1", port=port))
