"""The leader of a group of ranks: hands them calls, tells what comes of each, and starts them again when they die."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from arctic_trt.errors import ArcticTrtError, RefusedError
from arctic_trt.runtime.service.calls import Call, Calls, OnEvent, tell
from arctic_trt.runtime.service.connection import Connection
from arctic_trt.runtime.service.process import RanksProcess
from arctic_trt.runtime.service.protocol import (
    COUNTS,
    INTERNAL,
    READY,
    UNAVAILABLE,
    Limits,
    RankStats,
    cancel_message,
    decode_limits,
    decode_step,
    encode,
    failure,
    request_message,
)

STARTING, UP, DOWN, CLOSED = "starting", "ready", "down", "closed"
TICK_S = 0.1
LEAVE_S = 10.0
"""How long ranks that were told to leave may take."""
LAST_WORDS_S = 3.0
"""How long ranks that are dying may take, so that they can say why."""
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S, HEALTHY_S = 0.5, 30.0, 60.0

logger = logging.getLogger(__name__)

OnState = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupOptions:
    """What to start, with the flags of ``arctic-trt run``.

    ``python`` is an interpreter that has this package. A start may take ``start_timeout_s``, and ranks that have calls to
    compute may be silent for ``hang_timeout_s``.
    """

    engine_dir: Path
    tokenizer_dir: Path | None = None
    world_size: int = 1
    kv_cache_memory: str | None = None
    device: str | None = None
    max_tokens_in_paged_kv_cache: int | None = None
    python: str = sys.executable
    start_timeout_s: float = 1800.0
    hang_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStats(RankStats):
    """The ranks' figures with counts since the first start, calls ``under_way``, and how often the ranks were started again."""

    under_way: int = 0
    restarts: int = 0


class WorkerGroup:
    """The ranks of an engine, supervised; safe to use from several threads.

    ``state`` is "starting", "ready", "down" (between a death and the next start's success) or "closed". ``on_state`` is called
    with each new one, in order, from a thread of its own.
    """

    def __init__(
        self,
        options: GroupOptions,
        on_state: OnState = lambda state: None,
        *,
        command: Callable[[GroupOptions, Path], list[str]] | None = None,
    ) -> None:
        self.state = STARTING
        self.limits: Limits | None = None
        self._options = options
        self._command = command or service_command
        self._on_state = on_state
        self._states: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._calls = Calls(self._cancel)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._draining = False
        self._closing = threading.Event()
        self._settled = threading.Event()
        self._failure: ArcticTrtError | None = None
        self._stats, self._before, self._restarts = RankStats(), RankStats(), 0
        self._heard = self._leave_by = 0.0
        self._ready_since: float | None = None
        self._process: RanksProcess | None = None
        self._threads = [
            threading.Thread(target=self._supervise, name="ranks", daemon=True),
            threading.Thread(target=self._notify, name="ranks' state", daemon=True),
        ]

    @property
    def stats(self) -> GroupStats:
        """Figures as of the last step."""
        with self._lock:
            total = add_counts(self._before, self._stats)
        return GroupStats(**asdict(total), under_way=len(self._calls), restarts=self._restarts)

    @property
    def pids(self) -> list[int]:
        """The processes that run for the group now."""
        return self._process.pids if self._process else []

    def start(self) -> None:
        """Start the ranks and wait until they are ready; once.

        Raises the ranks' own complaint as :class:`UsageError`, :class:`RefusedError` or :class:`ArcticTrtError`.
        """
        for thread in self._threads:
            thread.start()
        self._settled.wait()
        if self._failure:
            raise self._failure

    def submit(self, body: Mapping[str, Any], on_event: OnEvent, *, end_ids: Sequence[int] | None = None) -> Call:
        """Ask for the completion of ``body``, a flat line of a batch job, and with ``stream`` false without events in between.

        ``end_ids`` are in place of the tokenizer's. ``on_event`` is told what comes, from the thread that reads for all calls, so
        it must not wait for anything; where no ranks are there to take the call, at once from this one.
        """
        call = self._calls.new(on_event)
        line = encode(request_message(call.id, body, None if end_ids is None else list(end_ids)))
        with self._lock:
            connection = None if self._draining else self._connection
            if connection is not None:
                if not len(self._calls):
                    self._heard = time.monotonic()
                self._calls.add(call)
                connection.send(line)
        if connection is None:
            closing = self._draining or self.state == CLOSED
            why = "The engine is shutting down." if closing else "The engine is not ready: ask again in a moment."
            tell(call, failure(call.id, UNAVAILABLE, why))
        return call

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more calls, wait for those under way for at most ``drain_s``, then end the ranks. Not from a listener."""
        self._draining = True
        if not self._calls.wait_until_none(drain_s):
            logger.warning("%d requests are under way after %.0f s, and end now.", len(self._calls), drain_s)
        self._leave_by = time.monotonic() + LEAVE_S
        self._closing.set()
        with self._lock:
            if self._connection is not None:
                self._connection.say_goodbye()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self.state = CLOSED

    def _cancel(self, call: int) -> None:
        with self._lock:
            if self._connection is not None and call in self._calls:
                self._connection.send(encode(cancel_message(call)))

    def _supervise(self) -> None:
        """One life of the ranks after the other, until the group is closed or the first start fails."""
        back_off_s = 0.0
        while not self._closing.is_set():
            failure = self._live()
            if self._closing.is_set():
                break
            if not self._settled.is_set():
                self._failure = failure
                break
            healthy_s = 0.0 if self._ready_since is None else time.monotonic() - self._ready_since
            back_off_s = next_back_off(back_off_s, healthy_s)
            logger.error("%s The ranks are started again in %.1f s.", failure, back_off_s)
            self._closing.wait(back_off_s)
            self._restarts += 1
        self._set_state(CLOSED)
        self._settled.set()

    def _live(self) -> ArcticTrtError:
        """Start the ranks, serve until they end, and leave nothing of them; returns why they ended."""
        self._ready_since = None
        try:
            process = self._process = RanksProcess(lambda path: self._command(self._options, path))
        except RefusedError as error:
            return error
        patience_s, given_up = 0.0, None
        try:
            given_up = self._converse(process)
            if given_up is None:
                patience_s = self._leave_by - time.monotonic() if self._closing.is_set() else LAST_WORDS_S
        except Exception as error:  # a group that nobody supervises would be worse than anything that can have happened
            logger.exception("What the ranks said is not understood.")
            given_up = ArcticTrtError(f"What the ranks said is not understood ({type(error).__name__}: {error}).")
        ended = process.end(patience_s)
        self._process = None
        return given_up or ended

    def _converse(self, process: RanksProcess) -> ArcticTrtError | None:
        """Tell what rank 0 says until it leaves; returns why it was given up, None if it left by itself."""
        began = time.monotonic()
        connection: Connection | None = None
        try:
            while (found := process.accept()) is None:
                if process.ended:
                    return None
                if self._starts_in_vain(began):
                    return self._too_slow()
            connection = Connection(found)
            while (messages := connection.receive(TICK_S)) is not None:
                for message in messages:
                    self._hear(message, connection)
                if self._ready_since is None and self._starts_in_vain(began):
                    return self._too_slow()
                if self._closing.is_set() and time.monotonic() > self._leave_by:
                    return ArcticTrtError(f"The ranks did not leave within {LEAVE_S:.1f} s.")
                silent_s = time.monotonic() - max(began, self._heard)
                if len(self._calls) and silent_s > self._options.hang_timeout_s:
                    return ArcticTrtError(f"The ranks have said nothing for {silent_s:.1f} s, with requests under way.")
            return None
        finally:
            if connection is not None:
                self._forget(connection)

    def _starts_in_vain(self, began: float) -> bool:
        return self._closing.is_set() or time.monotonic() - began > self._options.start_timeout_s

    def _too_slow(self) -> ArcticTrtError:
        return ArcticTrtError(f"The ranks were not ready after {self._options.start_timeout_s:.1f} s.")

    def _hear(self, message: Mapping[str, Any], connection: Connection) -> None:
        self._heard = time.monotonic()
        if message["type"] == READY:
            self.limits = decode_limits(message)
            self._ready_since = self._heard
            with self._lock:
                self._connection = connection
            self._set_state(UP)
            self._settled.set()
            return
        events, stats = decode_step(message)
        with self._lock:
            self._stats = stats
        for event in events:
            self._calls.tell(event)

    def _forget(self, connection: Connection) -> None:
        """Whoever waits is told, before anything that takes time."""
        closing = self._closing.is_set()
        with self._lock:
            self._connection = None
            self._before, self._stats = add_counts(self._before, self._stats), RankStats()
        if self.state == UP and not closing:
            self._set_state(DOWN)
        if closing:
            self._calls.fail_all(UNAVAILABLE, "The engine is shutting down.")
        else:
            self._calls.fail_all(INTERNAL, "The engine stopped while it computed this request: ask again.")
        connection.close()

    def _set_state(self, state: str) -> None:
        self.state = state
        self._states.put(state)

    def _notify(self) -> None:
        """In a thread of its own, so that a listener may take its time."""
        state = STARTING
        while state != CLOSED:
            state = self._states.get()
            try:
                self._on_state(state)
            except Exception:
                logger.exception("What listens to the state %r failed.", state)


def service_command(options: GroupOptions, path: Path) -> list[str]:
    """The command line of the ranks, which starts mpirun by itself."""
    flags = {
        "engine_dir": options.engine_dir,
        "tokenizer_dir": options.tokenizer_dir,
        "socket": path,
        "world_size": options.world_size,
        "device": options.device,
        "kv_cache_memory": options.kv_cache_memory,
        "max_tokens_in_paged_kv_cache": options.max_tokens_in_paged_kv_cache,
    }
    words = [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", str(value))]
    return [options.python, "-m", "arctic_trt", "service", *words]


def next_back_off(previous_s: float, healthy_s: float) -> float:
    """How long to wait before the next start, after ranks that were ready for ``healthy_s``."""
    if not previous_s or healthy_s >= HEALTHY_S:
        return FIRST_BACK_OFF_S
    return min(2 * previous_s, LONGEST_BACK_OFF_S)


def add_counts(before: RankStats, now: RankStats) -> RankStats:
    """What is there now, with the counts of both."""
    return replace(now, **{name: getattr(before, name) + getattr(now, name) for name in COUNTS})
