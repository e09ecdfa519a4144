"""What a server takes from anybody: bytes as they come over a socket, too much of them, and clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from arctic_trt.triton.openai.options import OpenAiOptions
from tests.support.scripted_engine import PIECES, ScriptedEngine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
Serve = Callable[..., str]


def connection(url: str) -> HTTPConnection:
    return HTTPConnection(urlsplit(url).netloc, timeout=20)


def ask(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any], HTTPResponse]:
    link = connection(url)
    link.request(method, path, body, headers)
    response = link.getresponse()
    data = response.read()
    link.close()
    return response.status, json.loads(data) if data else {}, response


def raw(url: str, data: bytes) -> socket.socket:
    place = urlsplit(url)
    link = socket.create_connection((place.hostname, place.port), timeout=20)
    link.sendall(data)
    return link


def post(body: bytes, *, length: int | None = None, path: str = CHAT) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


def reply(link: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    with link:
        while part := link.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_curl_needs_no_content_type(serve: Serve) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    status, answer, _ = ask(serve(ScriptedEngine()), "POST", CHAT, json.dumps(BODY).encode(), **form)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "".join(PIECES)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"messages": "\xc3\x28"}', "'utf-8' codec can't decode"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', "half a character"),
        (b'{"messages": [{"role": "user", "content": "a"}], "stop_words": "b"}', "The parameter 'stop_words' is not known."),
        (b"[1" + b"0" * 5000 + b"]", "is"),
    ],
)
def test_bad_bodies_are_answered_in_openai_s_shape(serve: Serve, body: bytes, expected: str) -> None:
    engine = ScriptedEngine()
    status, answer, _ = ask(serve(engine), "POST", CHAT, body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert expected in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert not engine.asked


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("POST", "/", 405)])
def test_paths_that_are_not_offered(serve: Serve, method: str, path: str, status: int) -> None:
    found, answer, _ = ask(serve(ScriptedEngine()), method, path)
    assert found == status and answer["error"]["message"] == f"{method} {path} is not offered."


def test_no_documentation_that_loads_from_elsewhere(serve: Serve) -> None:
    url = serve(ScriptedEngine())
    assert {ask(url, "GET", path)[0] for path in ("/docs", "/redoc", "/openapi.json")} == {404}


def test_a_body_that_is_announced_too_large_is_not_read(serve: Serve) -> None:
    engine = ScriptedEngine()
    url = serve(engine, max_request_bytes=1000)
    answer = reply(raw(url, post(b"", length=100_000_000)))
    assert answer.startswith(b"HTTP/1.1 413 ") and b"100000000 bytes, expected at most 1000 bytes" in answer
    assert b"connection: close" in answer.lower() and not engine.asked


def test_a_client_that_sends_it_all_the_same_gets_the_answer(serve: Serve) -> None:
    url = serve(ScriptedEngine(), max_request_bytes=1000)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    with client, pytest.raises(openai.APIStatusError, match="expected at most 1000 bytes") as caught:
        client.completions.create(model="arctic", prompt="a" * 20_000_000)
    assert caught.value.status_code == 413


def test_a_body_of_unknown_length_is_read_no_further_than_it_may_be(serve: Serve) -> None:
    url = serve(ScriptedEngine(), max_request_bytes=1000)
    link = raw(url, b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"1f4\r\n" + b" " * 500 + b"\r\n"
    sent = 0
    try:
        while sent < 10_000:
            link.sendall(piece)
            sent += 1
            time.sleep(0.001)
    except ConnectionError:
        pass
    assert 3 <= sent < 10_000
    assert b" 413 " in reply(link)[:20]


def test_the_largest_body_that_is_allowed(serve: Serve) -> None:
    body = json.dumps(BODY).encode()
    url = serve(ScriptedEngine(), max_request_bytes=len(body))
    assert ask(url, "POST", CHAT, body)[0] == 200
    assert ask(url, "POST", CHAT, body + b" ")[0] == 413


def test_a_body_that_does_not_come(serve: Serve) -> None:
    url = serve(ScriptedEngine(), body_timeout_s=0.05)
    answer = reply(raw(url, post(b"{", length=100)))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"more than 0.05 s" in answer


def test_one_request_too_many(serve: Serve) -> None:
    engine = ScriptedEngine(delay_s=0.2)
    url = serve(engine, max_concurrent=1)
    first = raw(url, post(json.dumps(BODY).encode()))
    engine.wait_until(lambda it: it.under_way == 1)
    status, answer, response = ask(url, "POST", CHAT, json.dumps(BODY).encode())
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded" and response.getheader("Retry-After") == "1"
    assert ask(url, "GET", "/v1/models")[0] == 200
    assert first.recv(20).startswith(b"HTTP/1.1 200")
    first.close()
    assert ask(url, "POST", CHAT, json.dumps(BODY).encode())[0] == 200


@pytest.mark.parametrize("end", [b"", b"{", json.dumps({**BODY, "n": 0}).encode(), json.dumps({**BODY, "stream": True}).encode()])
def test_no_request_keeps_its_place_however_it_ends(serve: Serve, end: bytes) -> None:
    url = serve(ScriptedEngine(), max_concurrent=1)
    for _ in range(3):
        raw(url, post(end, length=len(end) or 10)).close()
    deadline = time.monotonic() + 10
    while ask(url, "POST", CHAT, json.dumps(BODY).encode())[0] != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces_before", [0, 1])
def test_a_client_that_leaves_cancels_its_request(serve: Serve, stream: bool, pieces_before: int) -> None:
    engine = ScriptedEngine(reply=lambda _: ["word "] * 1000, delay_s=0.1)
    link = raw(serve(engine), post(json.dumps({**BODY, "stream": stream}).encode()))
    engine.wait_until(lambda it: it.under_way == 1)
    if stream and pieces_before:
        assert link.recv(20).startswith(b"HTTP/1.1 200")
    link.close()
    engine.wait_until(lambda it: it.under_way == 0)
    assert engine.cancelled == 1


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Basic abc"}, {"Authorization": "Bearer"}, {"Authorization": "Bearer ключ"}]
)
def test_without_the_key_nothing_below_v1_is_answered(serve: Serve, headers: dict[str, str]) -> None:
    engine = ScriptedEngine()
    url = serve(engine, api_key="key")
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/nothing")):
        status, answer, response = ask(url, method, path, b"{}", **{name: value.encode() for name, value in headers.items()})  # type: ignore[arg-type]
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert response.getheader("WWW-Authenticate") == "Bearer"
    assert ask(url, "GET", "/health")[0] == 200 and not engine.asked


def test_health_is_the_process_s_and_readiness_the_engine_s(serve: Serve) -> None:
    engine = ScriptedEngine(is_ready=False)
    url = serve(engine)
    assert ask(url, "GET", "/health")[0] == 200
    status, answer, _ = ask(url, "GET", "/health/ready")
    assert status == 503 and answer["error"]["code"] == "unavailable"
    engine.is_ready = True
    assert ask(url, "GET", "/health/ready")[0] == 200


def test_the_key_is_not_shown() -> None:
    assert "s3cret" not in repr(OpenAiOptions(grpc_url="a:1", api_key="s3cret"))
