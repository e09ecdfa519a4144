"""A server that streams completions as Triton and OpenAI-like servers do, and misbehaves when told to."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TRITON, OPENAI = "/v2/models/arctic/generate_stream", "/v1/completions"


class FakeServer(ThreadingHTTPServer):
    """``faults`` are taken one a request, None for a good answer; when they run out all answers are good."""

    daemon_threads = True

    def __init__(self, faults: list[str | None], delay_s: float, *, usage: bool, tokens_a_piece: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = faults
        self.delay_s = delay_s
        self.usage = usage
        self.tokens_a_piece = tokens_a_piece
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has seen enough of a bad answer hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, **body})
            fault = self.server.faults.pop(0) if self.server.faults else None
            self._inside = True
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            self._answer(body, fault)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Not under way any more; said before the end of an answer is sent, after which the client may ask again at once."""
        with self.server.lock:
            self.server.under_way -= self._inside
            self._inside = False

    def _answer(self, body: dict[str, Any], fault: str | None) -> None:
        if fault == "500" or self.path not in (TRITON, OPENAI):
            said = b'{"error": "the model\n is not ready"}'
            self.send_response(500 if fault else 404)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"] // self.server.tokens_a_piece
        for index in range(0 if fault == "empty" else count):
            time.sleep(self.server.delay_s)
            if fault in ("cut", "cut_cleanly") and index == count // 2:
                if fault == "cut_cleanly":
                    self._chunk(b"")
                self.close_connection = True
                return
            if fault in ("error_event", "not_json", "wrong_event") and index == 1:
                said = {"error_event": '{"error": "out of memory"}', "not_json": "<html>", "wrong_event": '{"id": 1}'}[fault]
                self._event(said)
                continue
            self._event(json.dumps(self._piece(index, last=index == count - 1)))
        if self.path == OPENAI:
            if self.server.usage:
                self._event(json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}))
            self._event("[DONE]")
        self._leave()
        self._chunk(b"")

    def _piece(self, index: int, *, last: bool) -> dict[str, Any]:
        if self.path == TRITON:
            return {"model_name": "arctic", "text_output": f" word{index}"}
        return {"choices": [{"index": 0, "text": f" word{index}", "finish_reason": "length" if last else None}]}

    def _event(self, data: str) -> None:
        self._chunk(f"data: {data}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


@contextmanager
def fake_llm_server(
    *faults: str | None, delay_s: float = 0.0, usage: bool = True, tokens_a_piece: int = 1
) -> Iterator[FakeServer]:
    """A running server."""
    server = FakeServer(list(faults), delay_s, usage=usage, tokens_a_piece=tokens_a_piece)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
