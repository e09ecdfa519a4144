"""The model ``arctic_bls``: text in, text out, with ``arctic`` in between, in one request that a client can cancel."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from arctic_trt.errors import UsageError
from arctic_trt.runtime.service.protocol import INTERNAL, INVALID, Event
from arctic_trt.triton.answers import Answers, events_of, failure_in
from arctic_trt.triton.control import control_path, send_cancel
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
    """A request of a client's; ``id`` is what ``arctic`` knows it by, ``wanted`` are the outputs that it names."""

    sender: Sender
    arrays: dict[str, Array]
    values: Values
    wanted: frozenset[str]
    id: str = field(default_factory=lambda: INNER + uuid.uuid4().hex)
    deadline: float = math.inf  # which is kept at arctic

    @property
    def choices(self) -> int:
        return choices_of(self.values)

    def is_cancelled(self) -> bool:
        return self.sender.is_cancelled()


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
        self._threads = ThreadPoolExecutor(capacity, thread_name_prefix="request")  # Triton has each wait for its responses
        self._control = control_path(os.getppid())
        self._watch: Watch[Asked] = Watch(lambda asked: send_cancel(self._control, asked.id), lambda asked: None)

    def execute(self, requests: Sequence[Any]) -> None:
        """Let ``requests`` in; returns when there is room for another one."""
        for request in requests:
            sender = Sender(self._stub.triton, request)
            try:
                self._take_in(request, sender)
            except UsageError as error:
                sender.send(self._stub.refusal(str(error), INVALID), last=True)
        self._slots.wait_for_room()

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()
        self._watch.close()

    def _take_in(self, request: Any, sender: Sender) -> None:
        if sender.is_cancelled():  # while it was waiting
            sender.end()
            return
        refuse_unknown(request.parameters())
        arrays = arrays_of(request)
        wanted = frozenset(request.requested_output_names())
        asked = Asked(sender=sender, arrays=arrays, values=read_values(arrays, CLIENT_INPUTS), wanted=wanted)
        self._slots.take(asked.choices)
        self._threads.submit(self._serve, asked)

    def _serve(self, asked: Asked) -> None:
        self._watch.add(asked)
        try:
            self._relay(asked, self._texts.prompt_ids(asked.values))
        except UsageError as error:
            asked.sender.send(self._stub.refusal(str(error), INVALID), last=True)
        except Exception as error:
            logger.exception("A request was lost.")
            asked.sender.send(self._stub.refusal(f"The request was lost ({error}).", INTERNAL), last=True)
        finally:
            self._watch.remove(asked)
            self._slots.release(asked.choices)

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
        asked.sender.end()

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
