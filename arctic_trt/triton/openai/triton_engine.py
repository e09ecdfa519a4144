"""The engine behind Triton: a request is a stream over gRPC to the model ``arctic_bls``, and ending it cancels the request."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import numpy as np

from arctic_trt.triton.openai.engine import Chunk, EngineError, FailureKind, NamedLogprobs
from arctic_trt.triton.tensors import CLIENT_INPUTS, IDS, MESSAGES, PARAMETERS, TEXT, Array, Tensor

NUMPY: Mapping[str, Any] = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
WIRE = {"STRING": "BYTES"}
"""Kinds of tensors that gRPC calls otherwise than ``config.pbtxt``."""
STATUS_AS_SUCH = {"triton_grpc_error": "true"}
"""Has Triton end a stream with the error's own status, which otherwise is lost."""
KINDS: Mapping[str, FailureKind] = {
    "INVALID_ARGUMENT": "invalid",
    "UNAVAILABLE": "unavailable",
    "NOT_FOUND": "unavailable",
    "CANCELLED": "unavailable",
    "DEADLINE_EXCEEDED": "unavailable",
}
READY_TIMEOUT_S = 5.0
QUEUE_FULL, QUEUE_LEFT = "Exceeds maximum queue size", "Request timeout expired"
INPUTS = {tensor.name: tensor for tensor in CLIENT_INPUTS}
TENSOR_OF_FIELD = {tensor.field: tensor.name for tensor in reversed(PARAMETERS) if tensor.field}


class TritonEngine:
    """``triton_model`` of the server whose gRPC listens at ``url``, as ``HOST:PORT``. Make requests from one event loop."""

    def __init__(self, url: str, triton_model: str) -> None:
        self._url = url
        self._model = triton_model
        self._connected: Any = None

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """See :meth:`arctic_trt.triton.openai.engine.Engine.generate`."""
        import grpc

        request = {"model_name": self._model, "inputs": infer_inputs(fields)}
        call = self._client.stream_infer(_once(request), headers=STATUS_AS_SUCH)
        try:
            async for result, error in call:
                if error is not None:  # of the queue, which has no status
                    raise failure("INTERNAL", error.message())
                for chunk in chunks_of(result.as_numpy):
                    yield chunk
        except grpc.RpcError as error:
            raise failure(error.code().name, error.details() or "") from None
        finally:
            call.cancel()

    async def ready(self) -> bool:
        """What Triton says, which includes the state of the worker group."""
        from tritonclient.utils import InferenceServerException

        try:
            return bool(await self._client.is_server_ready(client_timeout=READY_TIMEOUT_S))
        except InferenceServerException:
            return False

    async def close(self) -> None:
        """Close the connection."""
        if self._connected is not None:
            await self._connected.close()

    @property
    def _client(self) -> Any:
        if self._connected is None:  # belongs to the event loop that runs by now
            from tritonclient.grpc.aio import InferenceServerClient

            self._connected = InferenceServerClient(self._url)
        return self._connected


def tensors_of(fields: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs that ``fields`` are, each of shape [1, values]; raises :class:`EngineError` for numbers out of range."""
    given = dict(fields)
    prompt, messages = given.pop("prompt", None), given.pop("messages", None)
    values: dict[str, Any] = {}
    if messages is not None:
        values[MESSAGES] = json.dumps(messages)
    else:
        values[TEXT if isinstance(prompt, str) else IDS] = prompt
    if given.pop("ignore_eos", False):
        values["end_id"] = -1
    if (alternatives := given.pop("logprobs", None)) is not None:
        values |= {"return_log_probs": True, "top_logprobs": alternatives}
    values |= {TENSOR_OF_FIELD[field]: value for field, value in given.items()}
    return {name: _array(INPUTS[name], value) for name, value in values.items()}


def infer_inputs(fields: Mapping[str, Any]) -> list[Any]:
    """The same as tritonclient has it."""
    from tritonclient.grpc import InferInput

    inputs = []
    for name, array in tensors_of(fields).items():
        kind = INPUTS[name].kind
        inputs.append(InferInput(name, list(array.shape), WIRE.get(kind, kind)))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def chunks_of(tensor: Any) -> list[Chunk]:
    """The chunks of one response, of which ``tensor(name)`` gives an output or None; a response may have none."""
    texts = tensor("text_output")
    if texts is None:
        return []
    lengths, reasons, scored = (tensor(name).reshape(-1) for name in ("sequence_length", "finish_reason", "top_logprobs_json"))
    first, prompt_tokens = int(tensor("sequence_index").item()), int(tensor("prompt_tokens").item())
    return [
        Chunk(
            choice=first + index,
            text=text.decode(),
            num_tokens=int(lengths[index]),
            prompt_tokens=prompt_tokens,
            finish_reason=reasons[index].decode() or None,
            logprobs=parse_logprobs(scored[index]),
        )
        for index, text in enumerate(texts.reshape(-1))
    ]


def parse_logprobs(data: bytes) -> tuple[NamedLogprobs, ...] | None:
    """What ``top_logprobs_json`` says of one text; None where log probabilities were not asked for."""
    if not data:
        return None
    return tuple(
        NamedLogprobs(item["text"], item["logprob"], tuple((each["text"], each["logprob"]) for each in item["top"]))
        for item in json.loads(data)
    )


def failure(status: str, message: str) -> EngineError:
    """The error that a stream ended with, by the name of its gRPC status."""
    if QUEUE_FULL in message:
        return EngineError("busy", "The queue is full; ask again.")
    if QUEUE_LEFT in message:
        return EngineError("unavailable", "The request has waited in the queue for too long; ask again.")
    if status == "UNAVAILABLE" and "connect" in message:
        return EngineError("unavailable", "The engine does not answer; ask again.")
    return EngineError(KINDS.get(status, "internal"), message)


def _array(tensor: Tensor, value: Any) -> Array:
    values = value if isinstance(value, list) else [value]
    if tensor.kind == "STRING":
        return np.array([[each.encode() for each in values]], np.object_)
    dtype = np.dtype(NUMPY[tensor.kind])
    if dtype.kind in "iuf":
        limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
        wrong = next((each for each in values if not limits.min <= each <= limits.max), None)
        if wrong is not None:
            raise EngineError(
                "invalid", f"{tensor.field or 'prompt'} {wrong} is out of range, expected {limits.min} to {limits.max}."
            )
    return np.array([values], dtype)


async def _once(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield request
