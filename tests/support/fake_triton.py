"""Triton's gRPC with one model whose answers a test writes; it notices when a client cancels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as service
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

Outputs = dict[str, Any]
Answer = Callable[[Outputs], Iterator[Outputs]]


class RefusalError(Exception):
    """Ends a stream with a status."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class FakeTriton(service.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """``answer`` makes responses, tensors by name, of a request's tensors; ``error`` is one without a status."""

    answer: Answer
    is_ready: bool = True
    asked: list[Outputs] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return messages.ServerReadyResponse(ready=self.is_ready)

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self.left.set)
        self.metadata.append(dict(context.invocation_metadata()))
        for request in requests:
            tensors = {"model_name": request.model_name}
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
                tensors[tensor.name] = _array(tensor, raw)
            self.asked.append(tensors)
            try:
                for outputs in self.answer(tensors):
                    if "error" in outputs:
                        yield messages.ModelStreamInferResponse(error_message=outputs["error"])
                    else:
                        yield messages.ModelStreamInferResponse(infer_response=_response(outputs))
            except RefusalError as error:
                context.abort(error.status, str(error))


def _array(tensor: Any, raw: bytes) -> Any:
    if tensor.datatype == "BYTES":
        return deserialize_bytes_tensor(raw).reshape(tensor.shape)
    return np.frombuffer(raw, triton_to_np_dtype(tensor.datatype)).reshape(tensor.shape)


def _response(outputs: Outputs) -> Any:
    response = messages.ModelInferResponse(model_name="fake")
    kinds = {"i": "INT32", "f": "FP32", "O": "BYTES"}
    for name, array in outputs.items():
        response.outputs.add(name=name, datatype=kinds[array.dtype.kind], shape=array.shape)
        raw = serialize_byte_tensor(array).item() if array.dtype.kind == "O" else array.tobytes()
        response.raw_output_contents.append(raw)
    return response


@contextmanager
def fake_triton(answer: Answer) -> Iterator[tuple[FakeTriton, str]]:
    """(the server, its ``HOST:PORT``)."""
    fake = FakeTriton(answer)
    server = grpc.server(ThreadPoolExecutor(8))
    service.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        server.stop(grace=0).wait()
