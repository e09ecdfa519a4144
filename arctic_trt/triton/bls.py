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
from arctic_trt.runtime.service.protocol import INTERNAL, INVALID, Event
from arctic_trt.triton.answers import Answers, events_of, failure_in
from arctic_trt.triton.control import Line, control_path
from arctic_trt.triton.names import ENGINE, INNER
from arctic_trt.triton.slots import Slots
from arctic_trt.triton.stub import Sender, Stub, arrays_of, end_with_server, settings_of
from arctic_trt.triton.tensors import (
    ABOUT,
    CLIENT_INPUTS,
    EVENTS,
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

    ``line`` leads to the process of ``arctic`` that it was given to. ``lock`` guards ``over``.
    """

    sender: Sender
    arrays: dict[str, Array]
    values: Values
    wanted: frozenset[str]
    line: Line
    over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    id: str = field(default_factory=lambda: INNER + uuid.uuid4().hex)

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
        capacity = int(settings["capacity"])
        self._slots = Slots(capacity)
        self._control = control_path(os.getppid())
        self._line = Line(self._control)
        self._watch: Watch[Asked] = Watch(self._look)

    def execute(self, requests: Sequence[Any]) -> None:
        """Let ``requests`` in; returns when there is room for another one."""
        for request in requests:
            sender = Sender(self._stub.triton, request)
            try:
                self._take_in(request, sender)
            except UsageError as error:
                sender.send(self._stub.refusal(str(error), INVALID), last=True)
            except Exception as error:
                logger.exception("A request could not be taken in.")
                sender.send(self._stub.refusal(f"The request could not be taken in ({error}).", INTERNAL), last=True)
        self._slots.wait_for_room()

    def close(self) -> None:
        """Triton calls this when nothing is under way."""
        self._watch.close()

    def _take_in(self, request: Any, sender: Sender) -> None:
        if sender.is_cancelled():  # while it was waiting
            sender.end()
            return
        refuse_unknown(request.parameters())
        arrays = arrays_of(request)
        wanted = frozenset(request.requested_output_names())
        if not self._line.alive:
            self._line = Line(self._control)
        asked = Asked(sender=sender, arrays=arrays, values=read_values(arrays, CLIENT_INPUTS), wanted=wanted, line=self._line)
        self._slots.take(asked.choices)
        self._watch.add(asked)
        # Triton has a thread wait for the responses to each request, in vain if the process that was to give them dies
        threading.Thread(target=self._serve, args=(asked,), name="request", daemon=True).start()

    def _look(self, asked: Asked) -> None:
        """After a request under way, many times a second."""
        if not asked.line.alive:
            self._end(asked, self._stub.refusal("The engine's process has ended: ask again.", INTERNAL))
        elif asked.sender.is_cancelled():
            asked.line.cancel(asked.id)

    def _end(self, asked: Asked, refusal: Any = None) -> None:
        """Forget a request; who still waits for an answer gets ``refusal``, or nothing more."""
        with asked.lock:
            if asked.over:
                return
            asked.over = True
        self._watch.remove(asked)
        self._slots.release(asked.choices)
        asked.sender.send(refusal, last=True) if refusal else asked.sender.end()

    def _serve(self, asked: Asked) -> None:
        try:
            self._relay(asked, self._texts.prompt_ids(asked.values))
            self._end(asked)
        except UsageError as error:
            self._end(asked, self._stub.refusal(str(error), INVALID))
        except Exception as error:
            logger.exception("A request was lost.")
            self._end(asked, self._stub.refusal(f"The request was lost ({error}).", INTERNAL))

    def _relay(self, asked: Asked, prompt: list[int]) -> None:
        """Ask ``arctic`` and hand on what it says, as text."""
        answers = Answers(plan_ask(asked.values, prompt, echo=self._echo))
        request = self._stub.triton.InferenceRequest(
            model_name=ENGINE,
            request_id=asked.id,
            inputs=self._stub.tensors({**prompt_arrays(prompt), **engine_arrays(asked.arrays)}),
            requested_output_names=[EVENTS.name],
        )
        for response in request.exec(decoupled=True):
            if response.has_error():
                asked.sender.send(self._stub.triton.InferenceResponse(error=response.error()), last=True)
                return
            for tensor in response.output_tensors():
                self._answer(asked, answers, events_of(tensor.as_numpy()))

    def _answer(self, asked: Asked, answers: Answers, events: list[Event]) -> None:
        failed = failure_in(events)
        if failed is not None:
            asked.sender.send(self._stub.refusal(in_tensors(failed.error or ""), failed.code or INTERNAL), last=True)
            return
        responses = [self._stub.response(self._outputs(arrays), asked.wanted) for arrays in answers.take(events)]
        asked.sender.send_all(responses, last=events[-1].final)

    def _outputs(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        about = {tensor.name: arrays[inner_name(tensor)] for tensor in (*ABOUT, TOKEN_IDS)}
        return {**about, **self._texts.outputs(arrays)}


def engine_arrays(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Of a client's tensors those that ``arctic`` takes as they are, by their names there."""
    return {inner_name(tensor): arrays[tensor.name] for tensor in PARAMETERS if tensor.name in arrays}
