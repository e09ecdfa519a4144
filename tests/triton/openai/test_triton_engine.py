"""Fields to tensors, responses to chunks, and what a stream over gRPC may end with."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import pytest

from arctic_trt.triton.openai.bodies import parse_chat, parse_completion
from arctic_trt.triton.openai.engine import Chunk, EngineError, NamedLogprobs
from arctic_trt.triton.openai.triton_engine import TritonEngine, chunks_of, failure, parse_logprobs, tensors_of
from tests.support.fake_triton import RefusalError, fake_triton

FIELDS = {"prompt": "hé", "n": 1, "stream": True}


def response(*texts: str, index: int = 0, reasons: tuple[str, ...] = ("",), top: tuple[bytes, ...] = (b"",)) -> dict[str, Any]:
    return {
        "text_output": np.array([text.encode() for text in texts], np.object_),
        "sequence_length": np.array([[len(text) for text in texts]], np.int32),
        "finish_reason": np.array([[reason.encode() for reason in reasons]], np.object_),
        "top_logprobs_json": np.array([top], np.object_),
        "sequence_index": np.array([[index]], np.int32),
        "prompt_tokens": np.array([[9]], np.int32),
    }


async def collected(engine: TritonEngine, fields: Mapping[str, Any]) -> list[Chunk]:
    try:
        return [chunk async for chunk in engine.generate(fields)]
    finally:
        await engine.close()


def test_every_parameter_has_a_tensor() -> None:
    everything = {
        **{"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "seed": 2**63},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.5, "stop": ["a", "é"], "bad_words": "b", "ignore_eos": True, "n": 2},
        **{"logprobs": True, "top_logprobs": 3},
    }
    (fields,) = parse_chat(json.dumps({"messages": [{"role": "user", "content": "hi"}], **everything}).encode()).prompts
    tensors = tensors_of(fields)
    assert json.loads(tensors.pop("messages").item()) == [{"role": "user", "content": "hi"}]
    assert {name: array.tolist() for name, array in tensors.items()} == {
        **{"max_tokens": [[5]], "temperature": [[0.5]], "top_p": [[0.5]], "top_k": [[3]], "min_p": [[np.float32(0.1)]]},
        **{"repetition_penalty": [[1.5]], "presence_penalty": [[0.5]], "frequency_penalty": [[0.5]], "random_seed": [[2**63]]},
        **{"stop_words": [[b"a", "é".encode()]], "bad_words": [[b"b"]], "end_id": [[-1]], "num_return_sequences": [[2]]},
        **{"return_log_probs": [[True]], "top_logprobs": [[3]], "stream": [[False]]},
    }
    kinds = {name: array.dtype for name, array in tensors.items()}
    assert (kinds["random_seed"], kinds["temperature"], kinds["max_tokens"]) == (np.uint64, np.float32, np.int32)


def test_the_three_forms_of_a_prompt() -> None:
    (text,), (ids,) = (parse_completion(json.dumps({"prompt": prompt}).encode()).prompts for prompt in ("a", [1, 2]))
    assert tensors_of(text)["text_input"].tolist() == [[b"a"]]
    assert tensors_of(ids)["input_ids"].tolist() == [[1, 2]]
    assert tensors_of({"messages": []}).keys() == {"messages"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 2**31), ("seed", -1), ("seed", 2**64), ("top_k", 10**30), ("temperature", 1e39), ("prompt", [1, 2**31])],
)
def test_numbers_that_no_tensor_holds_are_the_client_s_fault(field: str, value: Any) -> None:
    with pytest.raises(EngineError, match=f"^{field} .* is out of range, expected") as caught:
        tensors_of({**FIELDS, field: value})
    assert caught.value.kind == "invalid"


def test_a_response_with_several_texts() -> None:
    outputs = response("aé", "b", reasons=("stop", "length"), top=(b"", b"[]"))
    assert chunks_of(outputs.get) == [
        Chunk(choice=0, text="aé", num_tokens=2, prompt_tokens=9, finish_reason="stop"),
        Chunk(choice=1, text="b", num_tokens=1, prompt_tokens=9, finish_reason="length", logprobs=()),
    ]
    assert chunks_of(response("c", index=3).get)[0].choice == 3
    assert chunks_of({}.get) == []


def test_log_probabilities_by_name() -> None:
    item = {"token": 5, "text": " a", "logprob": -0.5, "top": [{"token": 5, "text": " a", "logprob": -0.5}]}
    assert parse_logprobs(json.dumps([item]).encode()) == (NamedLogprobs(" a", -0.5, ((" a", -0.5),)),)
    assert parse_logprobs(b"") is None


def test_a_stream() -> None:
    def answer(_: Any) -> Iterator[dict[str, Any]]:
        yield response("Hé")
        yield {}
        yield response("!", reasons=("stop",))

    with fake_triton(answer) as (triton, address):
        chunks = asyncio.run(collected(TritonEngine(address, "arctic_bls"), FIELDS))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("Hé", None), ("!", "stop")]
    (asked,) = triton.asked
    assert asked["model_name"] == "arctic_bls" and asked["text_input"].item().decode() == "hé" and asked["stream"].item() is True
    assert triton.metadata[0]["triton_grpc_error"] == "true"


@pytest.mark.parametrize(
    ("status", "message", "kind", "told"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "The prompt is too long.", "invalid", "The prompt is too long."),
        (grpc.StatusCode.UNAVAILABLE, "The ranks are down.", "unavailable", "The ranks are down."),
        (grpc.StatusCode.UNAVAILABLE, "[request id: 1] Exceeds maximum queue size", "busy", "The queue is full; ask again."),
        (
            grpc.StatusCode.UNAVAILABLE,
            "Request timeout expired",
            "unavailable",
            "The request has waited in the queue for too long; ask again.",
        ),
        (grpc.StatusCode.NOT_FOUND, "Request for unknown model", "unavailable", "Request for unknown model"),
        (grpc.StatusCode.INTERNAL, "The request was lost.", "internal", "The request was lost."),
    ],
)
def test_a_stream_that_ends_with_a_status(status: grpc.StatusCode, message: str, kind: str, told: str) -> None:
    def answer(_: Any) -> Iterator[dict[str, Any]]:
        raise RefusalError(status, message)
        yield

    with fake_triton(answer) as (_, address), pytest.raises(EngineError) as caught:
        asyncio.run(collected(TritonEngine(address, "arctic_bls"), FIELDS))
    assert (caught.value.kind, caught.value.message) == (kind, told)


def test_a_stream_whose_error_has_no_status() -> None:
    full = {"error": "[request id: 1] Exceeds maximum queue size"}
    with fake_triton(lambda _: iter([full])) as (_, address), pytest.raises(EngineError, match="The queue is full") as caught:
        asyncio.run(collected(TritonEngine(address, "arctic_bls"), FIELDS))
    assert caught.value.kind == "busy"


def test_nobody_there() -> None:
    engine = TritonEngine("127.0.0.1:9", "arctic_bls")

    async def ask() -> None:
        assert not await engine.ready()
        await collected(engine, FIELDS)

    with pytest.raises(EngineError, match="The engine does not answer; ask again") as caught:
        asyncio.run(ask())
    assert caught.value.kind == "unavailable"


def test_every_kind_of_failure_is_known() -> None:
    assert {failure(status.name, "x").kind for status in grpc.StatusCode} == {"invalid", "unavailable", "internal"}


def test_closing_early_cancels_at_triton() -> None:
    def answer(_: Any) -> Iterator[dict[str, Any]]:
        yield response("a")
        deadline = time.monotonic() + 5
        while not triton.left.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)

    async def ask() -> None:
        engine = TritonEngine(address, "arctic_bls")
        async with aclosing(engine.generate(FIELDS)) as chunks:
            assert (await anext(chunks)).text == "a"
        assert await asyncio.to_thread(triton.left.wait, 3)
        await engine.close()

    with fake_triton(answer) as (triton, address):
        asyncio.run(ask())


def test_readiness_is_triton_s() -> None:
    async def ask() -> list[bool]:
        engine = TritonEngine(address, "arctic_bls")
        answers = [await engine.ready()]
        triton.is_ready = False
        answers.append(await engine.ready())
        await engine.close()
        return answers

    with fake_triton(lambda _: iter(())) as (triton, address):
        assert asyncio.run(ask()) == [True, False]
