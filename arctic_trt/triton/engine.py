"""The model ``arctic``: the leader of the ranks. Requests come from Triton, answers from the ranks; one thread sends them.

It lets in as many sequences as the engine batches and then keeps Triton waiting, so that whoever else comes stands in Triton's
queue, where its limits, priorities and timeouts apply.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arctic_trt.runtime.service.calls import Call
from arctic_trt.runtime.service.group import DOWN, UP, GroupOptions, WorkerGroup
from arctic_trt.runtime.service.protocol import INTERNAL, UNAVAILABLE, Event, event_json
from arctic_trt.triton.answers import Answers, failure_in
from arctic_trt.triton.control import Listener, control_path
from arctic_trt.triton.gate import Gate
from arctic_trt.triton.metrics import Metrics
from arctic_trt.triton.names import INNER
from arctic_trt.triton.outbox import Outbox
from arctic_trt.triton.server import HTTP_ADDRESS
from arctic_trt.triton.slots import Slots
from arctic_trt.triton.stub import Sender, Stub, arrays_of, end_with_server, settings_of, take_in
from arctic_trt.triton.tensors import (
    ENGINE_INPUTS,
    STOP,
    Ask,
    in_tensors,
    plan_ask,
    read_values,
    refuse_unknown,
    unpadded,
)
from arctic_trt.triton.watch import Watch

logger = logging.getLogger(__name__)

METRICS_PERIOD_S = 1.0
DRAIN_S = 60.0


@dataclass(eq=False, slots=True)
class Asked:
    """A request of Triton's under way at the ranks; ``wanted`` are the outputs that it names."""

    id: str
    sender: Sender
    answers: Answers
    wanted: frozenset[str]
    deadline: float
    call: Call | None = None

    @property
    def inner(self) -> bool:
        """It is from ``arctic_bls``, which hears all of it by the line."""
        return self.id.startswith(INNER)


class Engine:
    """``triton`` and ``args`` are what a model of Triton's has: its Python interface, and the arguments to ``initialize``."""

    def __init__(self, triton: Any, args: Mapping[str, str]) -> None:
        """Start the ranks and wait until they are ready; raises as :meth:`WorkerGroup.start` does."""
        self._stub = Stub(triton)
        settings = settings_of(args)
        self._timeout_s = float(settings.get("request_timeout_s", math.inf))
        self._echo = settings["exclude_input_in_output"] == "false"
        self._slots = Slots(int(settings["capacity"]))
        self._outbox: Outbox[Asked, Event] = Outbox()
        self._under_way: dict[int, Asked] = {}
        self._gate = self._find_gate()
        self._group = WorkerGroup(group_options(settings), on_state=self._on_state)
        self._control = control_path(os.getppid())
        end_with_server(self._abandon)
        self._group.start()
        self._metrics = Metrics(triton)
        self._closed = threading.Event()
        self._watch: Watch[Asked] = Watch(self._look)
        self._listener = Listener(self._control, self._cancel_id, self._cancel_inner)
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True) for target in (self._send, self._measure)
        ]
        for thread in self._threads:
            thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Let ``requests`` in; returns when there is room for another one."""
        take_in(self._stub, requests, self._take_in)
        self._slots.wait_for_room()

    def close(self) -> None:
        """Wait for what is under way, then end the ranks."""
        self._group.close(DRAIN_S)
        self._outbox.close()
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._watch.close()
        self._listener.close()
        if self._gate:
            self._gate.close()

    def _abandon(self) -> None:
        """The server is gone: leave nothing behind."""
        self._group.close()
        self._control.unlink(missing_ok=True)

    def _take_in(self, request: Any, sender: Sender) -> None:
        refuse_unknown(request.parameters())
        values = read_values(arrays_of(request), ENGINE_INPUTS, inner=True)
        if values.get(STOP.name):
            self._cancel_id(request.request_id())
            sender.end()
        elif sender.is_cancelled():  # while it was waiting
            sender.end()
        else:
            ask = plan_ask(values, unpadded(values), echo=self._echo)
            wanted = frozenset(request.requested_output_names())
            self._begin(Asked(request.request_id(), sender, Answers(ask), wanted, time.monotonic() + self._timeout_s), ask)

    def _begin(self, asked: Asked, ask: Ask) -> None:
        self._under_way[id(asked)] = asked
        self._slots.take(ask.choices)
        self._watch.add(asked)
        asked.call = self._group.submit(ask.body, lambda event: self._outbox.put(asked, event), end_ids=ask.end_ids)

    def _send(self) -> None:
        """In a thread of its own, so that no client keeps the ranks' news from another."""
        while (news := self._outbox.take()) is not None:
            for asked, events in news.items():
                if events[-1].final:
                    self._forget(asked)  # first, so that there is room when the client hears of the end and asks again
            inner = {asked.id: [event_json(event) for event in events] for asked, events in news.items() if asked.inner}
            if inner:
                self._listener.tell(inner)
            for asked, events in news.items():
                try:
                    self._answer(asked, events)
                except Exception:
                    logger.exception("The answer to request %r was lost.", asked.id)
                    self._cancel(asked)
                    with suppress(Exception):  # it may be the sending that failed
                        asked.sender.send(self._stub.refusal("The answer was lost: ask again.", INTERNAL), last=True)
                if events[-1].final:
                    self._metrics.ended(events[-1].first_token_s, events[-1].total_s)

    def _answer(self, asked: Asked, events: list[Event]) -> None:
        failed = failure_in(events)
        if failed is not None and not failed.final:  # it took too long, and still does
            self._cancel(asked)
        if asked.inner:
            if failed is not None or events[-1].final:
                asked.sender.end()
        elif failed is not None:
            asked.sender.send(self._stub.refusal(in_tensors(failed.error or ""), failed.code or INTERNAL), last=True)
        else:
            responses = [self._stub.response(arrays, asked.wanted) for arrays in asked.answers.take(events)]
            asked.sender.send_all(responses, last=events[-1].final)

    def _forget(self, asked: Asked) -> None:
        self._watch.remove(asked)
        self._under_way.pop(id(asked), None)
        self._slots.release(asked.answers.ask.choices)

    def _look(self, asked: Asked) -> None:
        """After a request under way, many times a second."""
        if asked.sender.is_cancelled():
            self._cancel(asked)
        elif time.monotonic() > asked.deadline:
            message = f"The request took longer than request_timeout, {self._timeout_s:g} s."
            self._outbox.put(asked, Event(id=0, error=message, code=UNAVAILABLE))

    def _cancel(self, asked: Asked) -> None:
        if asked.call is not None:  # else at the next look
            asked.call.cancel()

    def _cancel_id(self, request_id: str) -> None:
        for asked in list(self._under_way.values()):
            if request_id and asked.id == request_id:
                self._cancel(asked)

    def _find_gate(self) -> Gate | None:
        address = os.environ.get(HTTP_ADDRESS)
        if not address:
            logger.warning("%s is not set: the server calls itself ready also when the ranks are down.", HTTP_ADDRESS)
        return Gate(address) if address else None

    def _on_state(self, state: str) -> None:
        logger.info("The ranks are %s.", state)
        if self._gate and state in (UP, DOWN):
            self._gate.move(state == UP)

    def _cancel_inner(self) -> None:
        """The process of ``arctic_bls`` is gone, or does not listen any more."""
        for asked in list(self._under_way.values()):
            if asked.inner:
                self._cancel(asked)

    def _measure(self) -> None:
        while not self._closed.wait(METRICS_PERIOD_S):
            try:
                self._metrics.update({**asdict(self._group.stats), "up": float(self._group.state == UP)})
            except Exception:
                logger.exception("Metrics could not be updated.")


def group_options(settings: dict[str, str]) -> GroupOptions:
    """What the model's parameters say about the ranks."""
    blocks = settings.get("max_tokens_in_paged_kv_cache")
    return GroupOptions(
        engine_dir=Path(settings["engine_dir"]),
        tokenizer_dir=Path(settings["tokenizer_dir"]),
        world_size=int(settings["world_size"]),
        device=settings.get("device"),
        kv_cache_memory=settings.get("kv_cache_memory"),
        max_tokens_in_paged_kv_cache=None if blocks is None else int(blocks),
    )
