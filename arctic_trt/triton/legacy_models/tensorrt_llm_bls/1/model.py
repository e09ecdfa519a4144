"""From text to text through the C++ backend, in pieces or at once; a client that leaves ends its request in the engine."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from arctic_trt.errors import ArcticTrtError, UsageError
from arctic_trt.triton.legacy import ENGINE_MODEL, ENGINE_OUTPUTS
from arctic_trt.triton.legacy_text import Arrays, LegacyCall, LegacyText, Tensors
from arctic_trt.triton.stub import arrays_of, settings_of

FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
WANTED = [str(output["name"]) for output in ENGINE_OUTPUTS if "logits" not in str(output["name"])]
STOP = {name: np.array([[1]], np.int32) for name in ("input_ids", "input_lengths", "request_output_len")} | {
    "stop": np.array([[True]])
}


class TritonPythonModel:
    """A thread for each request: the engine's answers are waited for."""

    def initialize(self, args: dict[str, str]) -> None:
        self.text = LegacyText(Path(settings_of(args)["tokenizer_dir"]))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            given = arrays_of(request)
            threading.Thread(target=self.answer, args=(given, request.get_response_sender())).start()

    def answer(self, given: Tensors, sender: Any) -> None:
        try:
            self.follow(LegacyCall(self.text, given), sender)
            sender.send(flags=FINAL)
        except UsageError as error:
            fail(sender, pb.TritonError(str(error), pb.TritonError.INVALID_ARG))
        except Exception as error:  # without an answer the client would wait for ever
            fail(sender, pb.TritonError(str(error) or repr(error)))

    def follow(self, call: LegacyCall, sender: Any) -> None:
        """Raises what the engine or the request is at fault with."""
        request_id, stopped = str(uuid.uuid4()), False
        for response in ask(call.ask(), request_id):
            if response.has_error():
                raise ArcticTrtError(response.error().message())
            tensors = {item.name(): item.as_numpy() for item in response.output_tensors()}
            if tensors and not stopped:
                send(sender, call.take(tensors))
            if not stopped and (sender.is_cancelled() or call.over):
                stopped = True
                list(ask(STOP, request_id))
        send(sender, call.finish())


def ask(tensors: Tensors, request_id: str) -> Iterator[Any]:
    """The engine's responses, as they arrive; it knows by the id which request to stop."""
    inputs = [pb.Tensor(name, array) for name, array in tensors.items()]
    request = pb.InferenceRequest(model_name=ENGINE_MODEL, inputs=inputs, requested_output_names=WANTED, request_id=request_id)
    yield from request.exec(decoupled=True)


def send(sender: Any, responses: list[Arrays]) -> None:
    """Responses given as tensors by name."""
    for tensors in responses:
        sender.send(pb.InferenceResponse([pb.Tensor(name, array) for name, array in tensors.items()]))


def fail(sender: Any, error: Any) -> None:
    """The last word: Triton loses count of requests where an error and the final flag come apart."""
    sender.send(pb.InferenceResponse(error=error), flags=FINAL)
