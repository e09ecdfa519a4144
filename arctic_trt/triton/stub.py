"""Triton's Python interface, ``triton_python_backend_utils``, as the models use it; it exists only inside of Triton."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from arctic_trt.errors import UsageError
from arctic_trt.runtime.service.protocol import INTERNAL, INVALID, UNAVAILABLE
from arctic_trt.triton.tensors import Array

logger = logging.getLogger(__name__)

SERVER_PERIOD_S = 0.1
STUCK_S = 60.0
CODES = {INVALID: "INVALID_ARG", UNAVAILABLE: "UNAVAILABLE"}


class Stub:
    """``triton`` is that module."""

    def __init__(self, triton: Any) -> None:
        self.triton = triton

    def response(self, arrays: Mapping[str, Array], wanted: Set[str] | None = None) -> Any:
        """A response with those of ``arrays``, which have names, that are ``wanted``."""
        chosen = arrays if wanted is None else {name: array for name, array in arrays.items() if name in wanted}
        return self.triton.InferenceResponse(output_tensors=self.tensors(chosen))

    def refusal(self, message: str, code: str) -> Any:
        """A response that is an error, one sentence, with one of the codes of the ranks."""
        error = self.triton.TritonError(message, getattr(self.triton.TritonError, CODES.get(code, "INTERNAL")))
        return self.triton.InferenceResponse(error=error)

    def tensors(self, arrays: Mapping[str, Array]) -> list[Any]:
        """``arrays`` as Triton has them."""
        return [self.triton.Tensor(name, array) for name, array in arrays.items()]


class Sender:
    """Where the responses to ``request`` go; safe to use from several threads.

    To ask for a request's cancellation when its last response is out takes the server down, so that no two calls overlap, and
    those behind the last response have no effect.
    """

    def __init__(self, triton: Any, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._final = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._open = True
        self._lock = threading.Lock()

    def send(self, response: Any, *, last: bool = False) -> None:
        """Send one of several. An error has to be the last: an ensemble would never hear of the end from a flag of its own."""
        with self._lock:
            if self._open:
                self._open = not last
                self._sender.send(response, flags=self._final if last else 0)

    def send_all(self, responses: Sequence[Any], *, last: bool) -> None:
        """Send one after the other; ``last`` if nothing comes behind them."""
        for number, response in enumerate(responses, 1):
            self.send(response, last=last and number == len(responses))

    def end(self) -> None:
        """There is nothing more."""
        with self._lock:
            if self._open:
                self._open = False
                self._sender.send(flags=self._final)

    def is_cancelled(self) -> bool:
        """Whether the client has gone, or does not want it any more."""
        with self._lock:
            return self._open and bool(self._sender.is_cancelled())


def take_in(stub: Stub, requests: Sequence[Any], take: Callable[[Any, Sender], None]) -> None:
    """Have ``take`` begin each of ``requests``; one that it raises for is answered with an error."""
    for request in requests:
        sender = Sender(stub.triton, request)
        try:
            take(request, sender)
        except UsageError as error:
            sender.send(stub.refusal(str(error), INVALID), last=True)
        except Exception as error:
            logger.exception("A request could not be taken in.")
            sender.send(stub.refusal(f"The request could not be taken in ({error}).", INTERNAL), last=True)


def end_with_server(clean_up: Callable[[], None]) -> None:
    """Have this process end when the server does, after ``clean_up``, whatever its threads wait for.

    The kernel cannot be asked to: it would end a process with the thread that started it, and Triton's do not last. Some of
    Triton's calls wait for the server with Python's lock in their hands, so that no thread notices that it is gone; then a
    watchdog that needs no lock ends the process.
    """
    threading.Thread(target=_wait_for_orphanage, args=(os.getppid(), clean_up), name="server", daemon=True).start()


def _wait_for_orphanage(server: int, clean_up: Callable[[], None]) -> None:
    while os.getppid() == server:
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        time.sleep(SERVER_PERIOD_S)
    try:
        clean_up()
    finally:
        os._exit(1)


def arrays_of(message: Any) -> dict[str, Array]:
    """The tensors of a request of Triton's by their names."""
    return {tensor.name(): tensor.as_numpy() for tensor in message.inputs()}


def settings_of(args: Mapping[str, str]) -> dict[str, str]:
    """The model's parameters, of Triton's arguments to ``initialize``."""
    parameters = json.loads(args["model_config"])["parameters"]
    return {name: value["string_value"] for name, value in parameters.items()}
