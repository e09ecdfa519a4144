"""An OpenAI front end for tests of its supervision: knows its options, is healthy, and ends when told to."""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

OPTIONS = json.load(sys.stdin)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"pid": os.getpid(), **OPTIONS}).encode())


if OPTIONS.get("fails"):
    sys.exit("the front end has something to complain of")
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
HTTPServer((OPTIONS["host"], OPTIONS["port"]), Handler).serve_forever()
