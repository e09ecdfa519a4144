"""The calls that a leader waits for: who is told, and that nobody is forgotten."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from arctic_trt.runtime.service.protocol import Event, failure

OnEvent = Callable[[Event], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A submitted request. Its events come from one thread, the last one is ``final``."""

    id: int
    on_event: OnEvent
    _cancel: Callable[[int], None]

    def cancel(self) -> None:
        """End it with what there is, ``finish_reason`` "cancelled"; nothing happens to one that has ended."""
        self._cancel(self.id)


class Calls:
    """Calls under way. Safe to use from several threads; listeners run under no lock."""

    def __init__(self, cancel: Callable[[int], None]) -> None:
        self._cancel = cancel
        self._ids = itertools.count(1)
        self._open: dict[int, Call] = {}
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, call: int) -> bool:
        return call in self._open

    def new(self, on_event: OnEvent) -> Call:
        """A call with an id of its own, not yet under way."""
        return Call(next(self._ids), on_event, self._cancel)

    def add(self, call: Call) -> None:
        """From now on it is under way."""
        with self._changed:
            self._open[call.id] = call

    def tell(self, event: Event) -> None:
        """Tell an event to its call, which ends with a ``final`` one. One thread at a time does."""
        call = self._open.get(event.id)
        if call is None:
            return
        tell(call, event)
        if event.final:
            with self._changed:
                del self._open[event.id]
                self._changed.notify_all()

    def fail_all(self, code: str, message: str) -> int:
        """End all with an error; returns how many there were. Called where :meth:`tell` is."""
        with self._changed:
            found = list(self._open)
        for call in found:
            self.tell(failure(call, code, message))
        return len(found)

    def wait_until_none(self, timeout_s: float) -> bool:
        """Wait until all have ended; returns whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, timeout_s)


def tell(call: Call, event: Event) -> None:
    """One listener's failure is nobody else's."""
    try:
        call.on_event(event)
    except Exception:
        logger.exception("What listens to request %d failed.", call.id)
