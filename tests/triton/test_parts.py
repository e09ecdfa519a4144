"""What the models are made of: slots, the outbox, the line between them, the watch, the gate, metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.triton import control as control_module
from arctic_trt.triton import gate as gate_module
from arctic_trt.triton.control import Line, Listener, control_path
from arctic_trt.triton.gate import DOWN, STATE, Gate, shut_config
from arctic_trt.triton.metrics import FIGURES, Metrics, Rate
from arctic_trt.triton.outbox import Outbox
from arctic_trt.triton.slots import Slots
from arctic_trt.triton.stub import Sender
from arctic_trt.triton.watch import Watch
from tests.support.fake_stub import FakeTriton, InferenceResponse, Request

TIMEOUT_S = 20.0


def until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def in_thread(target: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def test_slots_keep_the_next_one_waiting() -> None:
    slots = Slots(2)
    slots.take(1)
    slots.wait_for_room()
    slots.take(3)  # a request with many outputs gets in
    waiting = in_thread(slots.wait_for_room)
    slots.release(1)
    waiting.join(0.05)
    assert waiting.is_alive()
    slots.release(3)
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()


def test_the_outbox_hands_out_together_what_came_meanwhile() -> None:
    outbox: Outbox[str, int] = Outbox()
    for key, item in (("a", 1), ("b", 2), ("a", 3)):
        outbox.put(key, item)
    assert outbox.take() == {"a": [1, 3], "b": [2]}
    taken: list[Any] = []
    waiting = in_thread(lambda: taken.append(outbox.take()))
    outbox.put("c", 4)
    waiting.join(TIMEOUT_S)
    outbox.put("d", 5)
    outbox.close()
    assert taken == [{"c": [4]}] and outbox.take() == {"d": [5]} and outbox.take() is None


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return control_path(1234)


def no_line(path: Path) -> bool:
    return not Line(path, lambda news: None).alive


def test_a_line_carries_ids_one_way_and_news_the_other(path: Path) -> None:
    cancelled: list[str] = []
    ends: list[int] = []
    news: dict[str, list[Any]] = {"a": [], "b": []}
    assert no_line(path)
    listener = Listener(path, cancelled.append, lambda: ends.append(1))
    lines = [Line(path, heard.append) for heard in news.values()]
    listener.tell({"x": [1, "é\n"]})  # whoever has a line misses nothing
    for each in ("x" * 40, "é"):
        lines[0].cancel(each)
    until(lambda: len(cancelled) == 2 and all(news.values()))
    assert cancelled == ["x" * 40, "é"] and news["a"] == news["b"] == [{"x": [1, "é\n"]}]
    lines[1].close()
    until(lambda: ends and not lines[1].alive)
    for _ in range(2):
        listener.tell({"y": []})
    until(lambda: len(news["a"]) == 3)
    assert lines[0].alive
    listener.close()
    until(lambda: not lines[0].alive)
    assert not path.exists() and no_line(path)


def test_one_who_does_not_read_keeps_nobody_waiting_for_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "PATIENCE_S", 1)
    listener = Listener(path, lambda each: None, lambda: None)
    stuck = threading.Event()
    line = Line(path, lambda news: stuck.wait(TIMEOUT_S))
    for _ in range(100):
        listener.tell({"x": ["y" * 100_000]})
    stuck.set()
    until(lambda: not line.alive)
    listener.close()


def test_a_line_to_a_killed_process(path: Path) -> None:
    listen = f"Listener(Path({str(path)!r}), print, print)"
    code = f"from arctic_trt.triton.control import *; {listen}; print('up', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        line = Line(path, lambda news: None)
        assert line.alive
        process.kill()
        process.wait()
        until(lambda: not line.alive)
        line.cancel("nobody")
    assert no_line(path)
    listener = Listener(path, lambda each: None, lambda: None)  # the file that was left is in nobody's way
    assert not line.alive and not no_line(path)
    listener.close()


def test_a_directory_of_others_is_refused(path: Path) -> None:
    path.parent.chmod(0o777)
    with pytest.raises(RefusedError, match="can be written by others"):
        control_path(1)


def test_the_watch_looks_at_all_until_they_are_removed(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    def look(each: str) -> None:
        seen.append(each)
        if each == "bad":
            raise ValueError

    watch = Watch(look)
    watch.add("bad")
    watch.add("good")
    until(lambda: seen.count("good") > 1)
    watch.remove("bad")
    watch.remove("good")
    watch.remove("good")
    watch.close()
    assert seen.count("bad") > 1 and "could not be looked after" in caplog.text


def test_a_sender_is_left_alone_behind_the_last_response() -> None:
    request = Request({}, outputs=[])
    sender = Sender(FakeTriton(), request)
    request.sender.cancelled = True
    assert sender.is_cancelled()
    sender.send_all([InferenceResponse(), InferenceResponse()], last=True)
    sender.send(InferenceResponse(), last=True)
    sender.end()
    assert not sender.is_cancelled()
    assert len(list(request.responses())) == 2


class Server(BaseHTTPRequestHandler):
    """Triton's model control, as far as the gate needs it."""

    asked: list[tuple[str, Any]]
    broken: int

    def do_GET(self) -> None:
        self._answer(200, {"name": "arctic_gate", "parameters": {STATE: {"string_value": "up"}, "other": {"string_value": "x"}}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if type(self).broken:
            type(self).broken -= 1
            self._answer(503, {})
            return
        self.asked.append((self.path.rpartition("/")[2], body))
        self._answer(400 if body else 200, {"error": "failed to load"})

    def _answer(self, code: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"asked": [], "broken": 0})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        in_thread(http.serve_forever)
        yield f"127.0.0.1:{http.server_port}", handler
        http.shutdown()


def test_the_gate_shuts_and_opens(server: tuple[str, type[Server]]) -> None:
    address, handler = server
    gate = Gate(address)
    gate.move(True)  # as it is
    gate.move(False)
    until(lambda: len(handler.asked) == 2)
    gate.move(True)
    until(lambda: len(handler.asked) == 3)
    gate.close()
    assert [verb for verb, _ in handler.asked] == ["unload", "load", "load"]
    config = json.loads(handler.asked[1][1]["parameters"]["config"])
    assert config["parameters"] == {STATE: {"string_value": DOWN}, "other": {"string_value": "x"}}
    assert handler.asked[2][1] == {}


def test_the_gate_tries_again(
    server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gate_module, "PAUSE_S", 0.01)
    address, handler = server
    handler.broken = 2
    gate = Gate(address)
    gate.move(False)
    until(lambda: len(handler.asked) == 2)
    gate.close()
    assert caplog.text.count("trying again") == 2


def test_a_shut_config_changes_nothing_else() -> None:
    config = {"name": "g", "parameters": {STATE: {"string_value": "up"}}}
    assert shut_config(config) == {"name": "g", "parameters": {STATE: {"string_value": DOWN}}}
    assert config["parameters"][STATE] == {"string_value": "up"}  # type: ignore[index]


def test_metrics_follow_figures() -> None:
    triton = FakeTriton()
    metrics = Metrics(triton)
    figures = {measure.source: 0.0 for measure in FIGURES}
    metrics.update({**figures, "up": 1, "generated_tokens": 10, "active": 3})
    metrics.update({**figures, "up": 0, "generated_tokens": 25, "active": 1})
    metrics.ended(0.5, None)
    metrics.ended(None, 2.0)
    values = {name: metric.value for name, metric in triton.metrics.items()}
    assert values["arctic_trt_generated_tokens_total"] == 25
    assert (values["arctic_trt_up"], values["arctic_trt_requests_active"]) == (0, 1)
    assert triton.metrics["arctic_trt_time_to_first_token_seconds"].observed == [0.5]
    assert triton.metrics["arctic_trt_request_seconds"].observed == [2.0]


def test_a_rate_is_of_the_last_seconds() -> None:
    rate = Rate(5.0)
    assert rate.update(0.0, 0) == 0
    assert rate.update(1.0, 100) == 100
    assert rate.update(5.0, 100) == 20
    assert rate.update(20.0, 100) == 0


def test_a_process_ends_with_its_server(tmp_path: Path) -> None:
    child = (
        "import sys, time; from arctic_trt.triton.stub import end_with_server\n"
        "end_with_server(lambda: open(sys.argv[1], 'w').close()); print('up', flush=True); time.sleep(60)"
    )
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]]); sys.stdin.read()"
    cleaned = tmp_path / "cleaned"
    with subprocess.Popen([sys.executable, "-c", parent, str(cleaned)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        os.kill(process.pid, 9)
        process.stdout.read()  # ends with the last of those who could write to it
    assert cleaned.exists()
