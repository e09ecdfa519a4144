"""The thread that looks after requests: whose client has gone, whose time is up, and never one that has ended."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import pytest

from arctic_trt.triton.watch import Watch


class Asked:
    """A request whose client may go; to look at it after its end crashes the server."""

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.gone = self.ended = False
        self.looked_late = False
        self.looks = 0
        self.within = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def is_cancelled(self) -> bool:
        self.looks += 1
        self.within.set()
        self.may_go_on.wait(10)
        self.looked_late |= self.ended
        return self.gone


@pytest.fixture
def told() -> list[tuple[str, Asked]]:
    return []


@pytest.fixture
def watch(told: list[tuple[str, Asked]]) -> Iterator[Watch[Asked]]:
    watch: Watch[Asked] = Watch(lambda asked: told.append(("gone", asked)), lambda asked: told.append(("late", asked)))
    yield watch
    watch.close()


def until(condition: Callable[[], object]) -> None:
    """Fails by the test's own timeout."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.005)


def test_it_tells_who_has_gone_and_who_is_late(watch: Watch[Asked], told: list[tuple[str, Asked]]) -> None:
    gone, late, fine = Asked(), Asked(deadline=0.0), Asked()
    for asked in (gone, late, fine):
        watch.add(asked)
    gone.gone = True
    until(lambda: ("gone", gone) in told and ("late", late) in told and fine.looks > 1)
    assert all(asked is not fine for _, asked in told)


def test_a_request_that_was_removed_is_not_looked_at_any_more(watch: Watch[Asked]) -> None:
    asked = Asked()
    asked.may_go_on.clear()
    watch.add(asked)
    asked.within.wait(10)

    def end() -> None:
        watch.remove(asked)
        asked.ended = True

    ending = threading.Thread(target=end)
    ending.start()
    ending.join(0.1)
    assert ending.is_alive(), "it waits for the look under way"
    asked.may_go_on.set()
    ending.join(10)
    looks = asked.looks
    other = Asked()
    watch.add(other)
    until(lambda: other.looks > 1)
    assert asked.looks == looks and not asked.looked_late


def test_one_listener_may_end_the_request_that_it_is_told_of(told: list[tuple[str, Asked]]) -> None:
    asked = Asked()
    asked.gone = True
    removed = threading.Event()

    def end(request: Asked) -> None:
        watch.remove(request)
        removed.set()

    watch: Watch[Asked] = Watch(end, end)
    watch.add(asked)
    assert removed.wait(10)
    watch.close()
