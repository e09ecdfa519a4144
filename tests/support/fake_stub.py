"""Triton's Python interface as far as our models use it, as strict as the real one is dangerous.

What takes the real server down fails here: to use a response sender behind its last response. Models ask each other through
:meth:`FakeTriton.serve`.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

FINAL = 1
TIMEOUT_S = 20.0

Arrays = Mapping[str, Any]


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    @property
    def arrays(self) -> dict[str, Any]:
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


class Sender:
    """Collects responses, None behind the last one."""

    def __init__(self) -> None:
        self.cancelled = False
        self.sent: queue.SimpleQueue[InferenceResponse | None] = queue.SimpleQueue()
        self._open = True

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert self._open, "something was sent behind the last response"
        if response is not None:
            assert not response.has_error() or flags == FINAL, "an error without the final flag leaks in an ensemble"
            self.sent.put(response)
        if flags == FINAL:
            self._open = False
            self.sent.put(None)

    def is_cancelled(self) -> bool:
        assert self._open, "this takes the real server down"
        return self.cancelled


class Request:
    """A client's request; outputs are those that it names, all if None."""

    def __init__(
        self, arrays: Arrays, *, id: str = "", parameters: Mapping[str, Any] | None = None, outputs: Sequence[str]
    ) -> None:
        self._arrays, self._id, self._parameters, self._outputs = arrays, id, dict(parameters or {}), list(outputs)
        self.sender = Sender()

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._arrays.items()]

    def request_id(self) -> str:
        return self._id

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def get_response_sender(self) -> Sender:
        return self.sender

    def responses(self) -> Iterator[InferenceResponse]:
        """As they come, until the last."""
        while (response := self.sender.sent.get(timeout=TIMEOUT_S)) is not None:
            yield response


@dataclass
class Metric:
    value: float = 0.0
    observed: list[float] = field(default_factory=list)

    def increment(self, by: float) -> None:
        assert by > 0
        self.value += by

    def set(self, value: float) -> None:
        self.value = value

    def observe(self, value: float) -> None:
        self.observed.append(value)


class FakeTriton:
    """The module; ``metrics`` are those that models made, by name."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    Tensor, TritonError, InferenceResponse = Tensor, TritonError, InferenceResponse

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}
        self.served: dict[str, Callable[[list[Request]], None]] = {}

    def serve(self, name: str, execute: Callable[[list[Request]], None]) -> None:
        """Let other models ask ``name``."""
        self.served[name] = execute

    def InferenceRequest(  # noqa: N802
        self, model_name: str, request_id: str, inputs: Sequence[Tensor], requested_output_names: Sequence[str]
    ) -> SimpleNamespace:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        request = Request(arrays, id=request_id, outputs=requested_output_names)

        def exec(*, decoupled: bool) -> Iterator[InferenceResponse]:
            assert decoupled
            threading.Thread(target=self.served[model_name], args=([request],), daemon=True).start()
            return request.responses()

        return SimpleNamespace(exec=exec)

    @property
    def MetricFamily(self) -> Any:  # noqa: N802
        def make(name: str, description: str, kind: str) -> SimpleNamespace:
            def metric(labels: Mapping[str, str], buckets: Sequence[float] | None = None) -> Metric:
                assert (kind == "HISTOGRAM") == (buckets is not None)
                self.metrics[name] = Metric()
                return self.metrics[name]

            return SimpleNamespace(Metric=metric)

        make.GAUGE, make.COUNTER, make.HISTOGRAM = "GAUGE", "COUNTER", "HISTOGRAM"  # type: ignore[attr-defined]
        return make


def strings(*texts: str | bytes) -> Any:
    """An input of texts, [1, n]."""
    return np.array([[text.encode() if isinstance(text, str) else text for text in texts]], np.object_)


def model_args(**parameters: str) -> dict[str, str]:
    """What ``initialize`` is given."""
    return {"model_config": json.dumps({"parameters": {name: {"string_value": value} for name, value in parameters.items()}})}
