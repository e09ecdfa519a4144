"""A tritonserver for tests of its supervision: starts at once, streams numbers, and has stubs that only sleep.

Run as a program with tritonserver's flags. Models are the folders of the repository: ``broken`` does not load, ``slow`` never
does, a server with ``stuck`` never unloads it, and one with ``patient`` does not end by SIGTERM, as with a client that keeps its
connection.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STUB_NAME = "triton_python_backend_stub"
SLEEP = "import time; time.sleep(600)"


def log(weight: str, text: str) -> None:
    print(f'{weight}1121 13:54:40.754117 14760 model_lifecycle.cc:472] "{text}"', file=sys.stderr, flush=True)


class Server:
    def __init__(self, words: list[str]) -> None:
        pairs = [word.removeprefix("--").split("=", 1) for word in words if "=" in word]
        self.flags = {key: value for key, value in pairs if key != "backend-config"}
        settings = dict(value.removeprefix("python,").split("=", 1) for key, value in pairs if key == "backend-config")
        self.models = sorted(path.name for path in Path(self.flags["model-repository"]).iterdir())
        self.key = self.flags["http-restricted-api"].partition(":")[2]
        self.stubs: dict[str, subprocess.Popen[bytes]] = {}
        self.loads: Counter[str] = Counter()
        self.streams = 0
        Path(f"/dev/shm/{settings['shm-region-prefix-name']}-region").write_bytes(b"x")

    def load(self, model: str) -> None:
        log("I", f"loading: {model}:1")
        if model == "slow":
            time.sleep(600)
        path = f"{self.flags['model-repository']}/{model}/1/model.py"
        self.stubs[model] = subprocess.Popen([sys.executable, "-c", SLEEP, STUB_NAME, path])
        self.loads[model] += 1
        log("I", f"successfully loaded '{model}'")

    def unload(self, model: str) -> None:
        threading.Thread(target=self._unload, args=(model,), daemon=True).start()

    def _unload(self, model: str) -> None:
        while self.streams or model == "stuck":
            time.sleep(0.02)
        if model not in self.stubs:
            return
        stub = self.stubs.pop(model)
        stub.kill()
        stub.wait()

    def start(self) -> None:
        log("E", "CudaDriverHelper has not been initialized.")
        print("Error: Failed to initialize NVML", flush=True)
        if "broken" in self.models:
            log("E", "failed to load 'broken' version 1: Internal: RefusedError: The ranks did not start.")
            sys.exit(1)
        for model in self.models:
            self.load(model)

    def stop(self, *_: object) -> None:
        threading.Thread(target=self._drain).start()

    def _drain(self) -> None:
        if "patient" in self.models:
            time.sleep(600)
        for model in list(self.stubs):
            self._unload(model)
        os._exit(0)

    def index(self) -> str:
        states = {model: "READY" if model in self.stubs else "UNAVAILABLE" for model in self.models}
        return json.dumps([{"name": model, "version": "1", "state": state} for model, state in states.items()])


class Handler(BaseHTTPRequestHandler):
    server_of: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.answer(200, json.dumps(self.server_of.loads) if self.path == "/loads" else "")

    def do_POST(self) -> None:
        server = self.server_of
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if self.path.startswith("/v2/repository/models/"):
            header, value = server.key.split("=")
            model, verb = self.path.split("/")[-2:]
            if self.headers.get(header) != value:
                self.answer(403, "This API is restricted")
            elif model not in server.models:
                self.answer(400, f"failed to {verb} '{model}'")
            else:
                getattr(server, verb)(model)
                self.answer(200)
            return
        if self.path == "/v2/repository/index":
            self.answer(200, server.index())
            return
        server.streams += 1
        self.send_response(200)
        self.end_headers()
        for number in range(body["count"]):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.wfile.flush()
            time.sleep(0.05)
        server.streams -= 1


def main() -> None:
    server = Handler.server_of = Server(sys.argv[1:])
    server.start()
    signal.signal(signal.SIGTERM, server.stop)
    ThreadingHTTPServer((server.flags["http-address"], int(server.flags["http-port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
