"""One request from its body to the last event of its answer. An ASGI endpoint, so that whatever happens is cleaned up here."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from arctic_trt.triton.openai.answers import Answer, event
from arctic_trt.triton.openai.bodies import Ask, ParseAsk
from arctic_trt.triton.openai.engine import Chunk, Engine, EngineError
from arctic_trt.triton.openai.errors import LIMIT, ApiError, of_engine
from arctic_trt.triton.openai.options import OpenAiOptions
from arctic_trt.triton.openai.relay import ClientGoneError, Receive, Send, merged, while_there

Chunks = AsyncGenerator[tuple[int, Chunk], None]
NO_BUFFERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""For proxies between here and the client: events are to be passed on as they are."""


class Slots:
    """The requests that are read or answered at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold a slot; raises :class:`ApiError` at once where none is free."""
        if self._taken >= self._count:
            message = f"{self._count} requests are under way, which is the most at a time; ask again."
            raise ApiError(429, message, kind=LIMIT, code="rate_limit_exceeded")
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1


class Generation:
    """``POST`` of one of the two interfaces; ``parse`` makes sense of a body, and ``prefix`` begins the names of answers."""

    def __init__(self, engine: Engine, options: OpenAiOptions, slots: Slots, parse: ParseAsk, prefix: str) -> None:
        self._engine = engine
        self._options = options
        self._slots = slots
        self._parse = parse
        self._prefix = prefix

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Raises :class:`ApiError` as long as nothing is sent."""
        with self._slots.one():
            try:
                ask = self._parse(await self._read(receive))
                check_model(ask.model, self._options.model)
                await while_there(receive, self._answer(ask, send))
            except EngineError as error:
                raise of_engine(error) from None
            except ClientGoneError:
                return

    async def _read(self, receive: Receive) -> bytes:
        patience_s = self._options.body_timeout_s
        try:
            return await asyncio.wait_for(_read(receive), patience_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"The request's body took more than {patience_s:g} s.", code="request_timeout") from None

    async def _answer(self, ask: Ask, send: Send) -> None:
        name = self._prefix + secrets.token_hex(12)
        answer = Answer(ask, name=name, created=int(time.time()), model=self._options.model)
        async with aclosing(merged(self._engine, ask.prompts)) as chunks:
            if ask.stream:
                await _stream(answer, chunks, send, name)
                return
            async for prompt, chunk in chunks:
                answer.add(prompt, chunk)
        _check_complete(answer)
        body = json.dumps(answer.whole(), ensure_ascii=False).encode()
        await _start(send, {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Request-Id": name})
        await send({"type": "http.response.body", "body": body})


def check_model(asked: str | None, model: str) -> None:
    """Raise :class:`ApiError` for a model that is not the one."""
    if asked not in (None, model):
        raise ApiError(404, f"The model {asked!r} does not exist, expected {model!r}.", code="model_not_found", param="model")


async def _stream(answer: Answer, chunks: Chunks, send: Send, name: str) -> None:
    """Send events. The first chunk is awaited before the status, so that a request that fails at once has its own status."""
    first = await anext(chunks, None)
    if first is None:
        _check_complete(answer)
        return
    await _start(send, {"Content-Type": "text/event-stream; charset=utf-8", "X-Request-Id": name, **NO_BUFFERS})
    try:
        await _send_events(send, answer.events(*first))
        async for prompt, chunk in chunks:
            await _send_events(send, answer.events(prompt, chunk))
        _check_complete(answer)
        await _send_events(send, answer.last_events())
    except EngineError as error:
        await _send_events(send, iter([event(of_engine(error).body)]))
    await send({"type": "http.response.body", "body": b""})


def _check_complete(answer: Answer) -> None:
    if not answer.complete:
        raise EngineError("internal", "The engine's answer broke off; ask again.")


async def _send_events(send: Send, events: Iterator[bytes]) -> None:
    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})


async def _start(send: Send, headers: dict[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _read(receive: Receive) -> bytes:
    """The whole body; raises :class:`ClientGoneError` where it breaks off."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
