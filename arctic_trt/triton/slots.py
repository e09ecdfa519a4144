"""How many sequences a model lets in at once: all others wait where Triton's own queue policy applies to them."""

from __future__ import annotations

import threading


class Slots:
    """``capacity`` sequences; a request may take the count beyond it, so that one with many outputs gets in at all."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._taken = 0
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """Sequences that are in."""
        return self._taken

    def take(self, count: int) -> None:
        with self._changed:
            self._taken += count

    def release(self, count: int) -> None:
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Return when the next request may come in."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self._capacity)
