"""One thread that looks after all requests of a model: whose client has gone, whose time is up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

PERIOD_S = 0.04
"""Between two looks, while there is a request. To ask Triton whether one is cancelled takes some 0.1 ms."""

Request = TypeVar("Request")


class Watch(Generic[Request]):
    """Calls ``look`` with each request again and again, until it is removed."""

    def __init__(self, look: Callable[[Request], None]) -> None:
        self._look = look
        self._requests: dict[int, Request] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        with self._changed:
            self._requests[id(request)] = request
            self._changed.notify()

    def remove(self, request: Request) -> None:
        """Once more it may be looked at, if that has begun."""
        with self._changed:
            self._requests.pop(id(request), None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or self._closed)
                if self._closed:
                    return
                requests = list(self._requests.values())
            for request in requests:
                try:
                    self._look(request)
                except Exception:  # the others are to be looked after all the same
                    logger.exception("A request could not be looked after.")
            time.sleep(PERIOD_S)
