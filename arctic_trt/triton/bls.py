"""The model ``arctic_bls``: text in, text out, with ``arctic`` in between, in one request that a client can cancel."""

from __future__ import annotations

import logging
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arctic_trt.errors import UsageError
from arctic_trt.runtime.service.protocol import INTERNAL, INVALID, Event, event_of
from arctic_trt.triton.answers import Answers, failure_in
from arctic_trt.triton.control import Line, News, control_path
from arctic_trt.triton.names import ENGINE, INNER
from arctic_trt.triton.outbox import Outbox
from arctic_trt.triton.slots import Slots
from arctic_trt.triton.stub import Sender, Stub, arrays_of, end_with_server, settings_of, take_in
from arctic_trt.triton.tensors import (
    ABOUT,
    CLIENT_INPUTS,
    PARAMETERS,
    TOKEN_IDS,
    Array,
    Values,
    choices_of,
    in_tensors,
    inner_name,
    plan_ask,
    read_values,
    refuse_unknown,
)
from arctic_trt.triton.text import Texts, prompt_arrays
from arctic_trt.triton.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True, kw_only=True)
class Asked:
    """A request of a client's; ``id`` is what ``arctic`` knows it by, ``wanted`` are the outputs that it names.

    ``line`` leads to the process of ``arctic`` that it was given to; ``answers`` are there once it was.
    """

    sender: Sender
    arrays: dict[str, Array]
    values: Values
    wanted: frozenset[str]
    line: Line
    id: str = field(default_factory=lambda: INNER + uuid.uuid4().hex)
    answers: Answers | None = None

    @property
    def choices(self) -> int:
        return choices_of(self.values)


class Bls:
    """``triton`` and ``args`` are what a model of Triton's has: its Python interface, and the arguments to ``initialize``."""

    def __init__(self, triton: Any, args: Mapping[str, str]) -> None:
        self._stub = Stub(triton)
        settings = settings_of(args)
        end_with_server(lambda: None)
        self._texts = Texts(settings)
        self._echo = settings["exclude_input_in_output"] == "false"
        self._slots = Slots(int(settings["capacity"]))
        self._under_way: dict[str, Asked] = {}
        self._outbox: Outbox[Asked, Event] = Outbox()
        self._control = control_path(os.getppid())
        self._line = Line(self._control, self._hear)
        self._watch: Watch[Asked] = Watch(self._look)
        self._sending = threading.Thread(target=self._send, name="sending", daemon=True)
        self._sending.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Let ``requests`` in; returns when there is room for another one."""
        take_in(self._stub, requests, self._take_in)
        self._slots.wait_for_room()

    def close(self) -> None:
        """Triton calls this when nothing is under way."""
        self._watch.close()
        self._outbox.close()
        self._sending.join()
        self._line.close()

    def _take_in(self, request: Any, sender: Sender) -> None:
        if sender.is_cancelled():  # while it was waiting
            sender.end()
            return
        refuse_unknown(request.parameters())
        arrays = arrays_of(request)
        wanted = frozenset(request.requested_output_names())
        if not self._line.alive:
            self._line = Line(self._control, self._hear)
        asked = Asked(sender=sender, arrays=arrays, values=read_values(arrays, CLIENT_INPUTS), wanted=wanted, line=self._line)
        self._under_way[asked.id] = asked
        self._slots.take(asked.choices)
        self._watch.add(asked)
        # Triton has a thread wait for the end of each request, in vain if the process that computes it dies
        threading.Thread(target=self._ask, args=(asked,), name="request", daemon=True).start()

    def _ask(self, asked: Asked) -> None:
        """Put the request to ``arctic``; what it says comes by the line, but for a refusal to let the request in at all."""
        try:
            prompt = self._texts.prompt_ids(asked.values)
            asked.answers = Answers(plan_ask(asked.values, prompt, echo=self._echo))
            request = self._stub.triton.InferenceRequest(
                model_name=ENGINE,
                request_id=asked.id,
                inputs=self._stub.tensors({**prompt_arrays(prompt), **engine_arrays(asked.arrays)}),
                requested_output_names=[TOKEN_IDS.inner],
            )
            for response in request.exec(decoupled=True):
                if response.has_error():
                    self._end(asked, self._stub.triton.InferenceResponse(error=response.error()))
        except UsageError as error:
            self._end(asked, self._stub.refusal(str(error), INVALID))
        except Exception as error:
            logger.exception("A request was lost.")
            self._end(asked, self._stub.refusal(f"The request was lost ({error}).", INTERNAL))

    def _hear(self, news: News) -> None:
        """By the line: events of requests, in which nobody may be interested any more."""
        for request_id, events in news.items():
            asked = self._under_way.get(request_id)
            if asked is not None:
                for event in events:
                    self._outbox.put(asked, event_of(event))

    def _send(self) -> None:
        """In a thread of its own, so that what comes meanwhile is sent together."""
        while (news := self._outbox.take()) is not None:
            for asked, events in news.items():
                try:
                    self._answer(asked, events)
                except Exception:
                    logger.exception("An answer was lost.")
                    self._end(asked, self._stub.refusal("The answer was lost: ask again.", INTERNAL))
                    asked.line.cancel(asked.id)

    def _answer(self, asked: Asked, events: list[Event]) -> None:
        failed = failure_in(events)
        if failed is not None:
            self._end(asked, self._stub.refusal(in_tensors(failed.error or ""), failed.code or INTERNAL))
            return
        final = events[-1].final
        if final:
            self._forget(asked)  # first, so that there is room when the client hears of the end and asks again
        taken = asked.answers.take(events) if asked.answers else []
        asked.sender.send_all([self._stub.response(self._outputs(arrays), asked.wanted) for arrays in taken], last=final)

    def _look(self, asked: Asked) -> None:
        """After a request under way, many times a second."""
        if not asked.line.alive:
            self._end(asked, self._stub.refusal("The engine's process has ended: ask again.", INTERNAL))
        elif asked.sender.is_cancelled():
            asked.line.cancel(asked.id)

    def _end(self, asked: Asked, refusal: Any) -> None:
        """Answer a request with ``refusal``, unless it has ended."""
        self._forget(asked)
        asked.sender.send(refusal, last=True)

    def _forget(self, asked: Asked) -> None:
        if self._under_way.pop(asked.id, None) is not None:
            self._watch.remove(asked)
            self._slots.release(asked.choices)

    def _outputs(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        about = {tensor.name: arrays[inner_name(tensor)] for tensor in (*ABOUT, TOKEN_IDS)}
        return {**about, **self._texts.outputs(arrays)}


def engine_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Of a client's tensors those that ``arctic`` takes as they are, by their names there."""
    return {inner_name(tensor): arrays[tensor.name] for tensor in PARAMETERS if tensor.name in arrays}
