"""What is to be sent, between those who have it and the one thread that sends."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")


class Outbox(Generic[Key, Item]):
    """Items by receiver. What comes for a receiver while the sender is busy is handed out together."""

    def __init__(self) -> None:
        self._waiting: dict[Key, list[Item]] = {}
        self._closed = False
        self._changed = threading.Condition()

    def put(self, key: Key, item: Item) -> None:
        with self._changed:
            self._waiting.setdefault(key, []).append(item)
            self._changed.notify()

    def take(self) -> dict[Key, list[Item]] | None:
        """All that waits, as soon as something does; None when the box is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            taken, self._waiting = self._waiting, {}
            return taken or None

    def close(self) -> None:
        """Let the sender leave when it has sent what waits."""
        with self._changed:
            self._closed = True
            self._changed.notify()
