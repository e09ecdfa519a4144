"""Orders to a server over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from arctic_trt.errors import ArcticTrtError
from arctic_trt.triton.admin import Admin
from tests.support.serving import free_ports


class Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None, Any]]
    status = 200
    said = b"the ranks are down"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append((self.path, self.headers["arctic-trt-key"], json.loads(body or "null")))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.said)

    do_POST = do_GET


@pytest.fixture
def server() -> Iterator[tuple[Admin, type[Handler]]]:
    kind = type("Fresh", (Handler,), {"asked": []})
    with HTTPServer(("127.0.0.1", 0), kind) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield Admin(f"127.0.0.1:{http.server_port}", "secret"), kind
        http.shutdown()


def test_models_are_loaded_with_the_key(server: tuple[Admin, type[Handler]]) -> None:
    admin, handler = server
    admin.unload("arctic")
    admin.load("arctic")
    where = "/v2/repository/models/arctic"
    assert handler.asked == [(f"{where}/unload", "secret", {}), (f"{where}/load", "secret", {})]


def test_a_model_that_does_not_load(server: tuple[Admin, type[Handler]]) -> None:
    admin, handler = server
    handler.status = 400
    with pytest.raises(ArcticTrtError, match="tritonserver did not load arctic: the ranks are down"):
        admin.load("arctic")
    assert not admin.is_ready()


def test_models_that_are_not_gone_yet(server: tuple[Admin, type[Handler]]) -> None:
    admin, handler = server
    states = {"arctic": "READY", "ensemble": "UNLOADING", "arctic_bls": "UNAVAILABLE"}
    handler.said = json.dumps([*({"name": name, "state": state} for name, state in states.items()), {"name": "new"}]).encode()
    assert admin.loaded() == {"arctic", "ensemble"}
    assert handler.asked == [("/v2/repository/index", "secret", {})]


@pytest.mark.parametrize(("status", "said"), [(200, b"<html>"), (403, b"restricted")])
def test_models_that_nobody_lists(server: tuple[Admin, type[Handler]], status: int, said: bytes) -> None:
    admin, handler = server
    handler.status, handler.said = status, said
    with pytest.raises(ArcticTrtError, match="tritonserver did not list its models: "):
        admin.loaded()


def test_readiness(server: tuple[Admin, type[Handler]]) -> None:
    admin, handler = server
    assert admin.is_ready() and admin.is_ready("/health")
    assert [path for path, _, _ in handler.asked] == ["/v2/health/ready", "/health"]


def test_nobody_there() -> None:
    admin = Admin(f"127.0.0.1:{free_ports(1)[0]}", "")
    assert not admin.is_ready()
    with pytest.raises(ArcticTrtError, match=r"tritonserver did not unload arctic: .*Connection refused"):
        admin.unload("arctic")
