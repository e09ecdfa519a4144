"""One thread that looks after all requests of a model: whose client has gone, and whose time is up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

PERIOD_S = 0.04
"""Between two looks, while there is a request. A look asks the server about each of them, which takes some 0.05 ms."""


class Watched(Protocol):
    """A request under way."""

    deadline: float

    def is_cancelled(self) -> bool: ...


Request = TypeVar("Request", bound=Watched)


class Watch(Generic[Request]):
    """Calls ``on_gone`` and ``on_late`` with a request at every look, until it is removed."""

    def __init__(self, on_gone: Callable[[Request], None], on_late: Callable[[Request], None]) -> None:
        self._on_gone = on_gone
        self._on_late = on_late
        self._requests: dict[int, Request] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        with self._changed:
            self._requests[id(request)] = request
            self._changed.notify()

    def remove(self, request: Request) -> None:
        with self._changed:
            self._requests.pop(id(request), None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _look(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or self._closed)
                if self._closed:
                    return
                requests = list(self._requests.values())
            for request in requests:
                if request.is_cancelled():
                    self._on_gone(request)
                elif time.monotonic() > request.deadline:
                    self._on_late(request)
            time.sleep(PERIOD_S)
