"""Triton's Python interface, ``triton_python_backend_utils``, as the models use it; it exists only inside of Triton."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from arctic_trt.runtime.service.protocol import INVALID, UNAVAILABLE
from arctic_trt.triton.tensors import Array

CODES = {INVALID: "INVALID_ARG", UNAVAILABLE: "UNAVAILABLE"}


class Stub:
    """``triton`` is that module."""

    def __init__(self, triton: Any) -> None:
        self.triton = triton
        self._final = triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL

    def response(self, arrays: Mapping[str, Array]) -> Any:
        """A response with ``arrays`` by their names."""
        return self.triton.InferenceResponse(output_tensors=self.tensors(arrays))

    def refusal(self, message: str, code: str) -> Any:
        """A response that is an error, one sentence, with one of the codes of the ranks."""
        error = self.triton.TritonError(message, getattr(self.triton.TritonError, CODES.get(code, "INTERNAL")))
        return self.triton.InferenceResponse(error=error)

    def tensors(self, arrays: Mapping[str, Array]) -> list[Any]:
        """``arrays`` as Triton has them."""
        return [self.triton.Tensor(name, array) for name, array in arrays.items()]

    def send(self, sender: Any, response: Any, *, last: bool = False) -> None:
        """A response of several. An error is always the last: sent without the flag, an ensemble would never hear of the end."""
        sender.send(response, flags=self._final if last else 0)

    def end(self, sender: Any) -> None:
        """Nothing more."""
        sender.send(flags=self._final)


def arrays_of(message: Any) -> dict[str, Array]:
    """The tensors of a request of Triton's by their names."""
    return {tensor.name(): tensor.as_numpy() for tensor in message.inputs()}


def settings_of(args: Mapping[str, str]) -> dict[str, str]:
    """The model's parameters, of Triton's arguments to ``initialize``."""
    parameters = json.loads(args["model_config"])["parameters"]
    return {name: value["string_value"] for name, value in parameters.items()}
