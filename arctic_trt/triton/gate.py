"""Readiness that follows the ranks: Triton calls itself ready as long as its own processes live.

The model ``arctic_gate`` does nothing but fail to load while the ranks are down, which makes the whole server not ready. It is
loaded and unloaded over HTTP: a model that does so by Triton's own Python interface takes the server down.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError

from arctic_trt.triton.names import GATE
from arctic_trt.triton.server import CONTROL_KEY, KEY_HEADER

logger = logging.getLogger(__name__)

STATE, UP, DOWN = "state", "up", "down"
TIMEOUT_S = 30.0
PAUSE_S = 1.0


class Gate:
    """Keeps the readiness of the server at ``address``, host:port, as :meth:`move` was last told, from a thread of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._wanted: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        threading.Thread(target=self._follow, name="readiness", daemon=True).start()

    def move(self, up: bool) -> None:
        """Have the server ready or not, soon."""
        self._wanted.put(up)

    def close(self) -> None:
        """Change nothing any more."""
        self._wanted.put(None)

    def _follow(self) -> None:
        is_up = True  # Triton has loaded it
        while (wanted := self._latest()) is not None:
            if wanted == is_up:
                continue
            try:
                self._open() if wanted else self._shut()
                is_up = wanted
            except OSError as error:
                logger.warning("The server's readiness cannot be changed (%s), trying again.", error)
                time.sleep(PAUSE_S)
                if self._wanted.empty():
                    self._wanted.put(wanted)

    def _latest(self) -> bool | None:
        wanted = self._wanted.get()
        while not self._wanted.empty():
            wanted = self._wanted.get()
        return wanted

    def _open(self) -> None:
        self._ask(f"repository/models/{GATE}/load", {})

    def _shut(self) -> None:
        shut = shut_config(self._ask(f"models/{GATE}/config"))
        self._ask(f"repository/models/{GATE}/unload", {})
        try:
            self._ask(f"repository/models/{GATE}/load", {"parameters": {"config": json.dumps(shut)}})
        except HTTPError as error:
            if error.code != 400:  # the code of a model that fails to load, as this one should
                raise

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {KEY_HEADER: os.environ.get(CONTROL_KEY, "")}
        request = urllib.request.Request(f"http://{self._address}/v2/{path}", data, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer: dict[str, Any] = json.loads(response.read() or b"{}")
            return answer


def shut_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of the gate, as JSON has it, with which it does not load."""
    return {**config, "parameters": {**config["parameters"], STATE: {"string_value": DOWN}}}
