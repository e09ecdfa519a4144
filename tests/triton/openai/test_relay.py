"""Streams put together, and work that ends when nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import pytest

from arctic_trt.triton.openai.engine import EngineError
from arctic_trt.triton.openai.relay import ClientGoneError, Message, merged, while_there
from tests.support.scripted_engine import PIECES, ScriptedEngine

PROMPT = {"prompt": "a", "n": 1, "stream": True}


async def texts(engine: ScriptedEngine, prompts: list[dict[str, Any]]) -> list[str]:
    found = [""] * len(prompts)
    async with aclosing(merged(engine, prompts)) as chunks:
        async for number, chunk in chunks:
            found[number] += chunk.text
    return found


def test_all_prompts_arrive_whole_and_are_under_way_at_once() -> None:
    engine = ScriptedEngine(delay_s=0.001)
    assert asyncio.run(texts(engine, [PROMPT] * 50)) == ["".join(PIECES)] * 50
    assert (engine.under_way, engine.cancelled) == (0, 0)


@pytest.mark.parametrize("failure", [EngineError("busy", "Full."), ZeroDivisionError("a bug")])
def test_a_failure_ends_the_others_and_is_told(failure: Exception) -> None:
    fails = ScriptedEngine(failure=failure, pieces_first=2, delay_s=0.001)

    async def ask() -> None:
        with pytest.raises(type(failure)):
            await texts(fails, [PROMPT] * 3)
        assert fails.under_way == 0

    asyncio.run(ask())


def test_closing_early_cancels_every_prompt() -> None:
    engine = ScriptedEngine(delay_s=0.01)

    async def ask() -> None:
        async with aclosing(merged(engine, [PROMPT] * 3)) as chunks:
            await anext(chunks)
        assert (engine.under_way, engine.cancelled) == (0, 3)

    asyncio.run(ask())


def test_an_engine_waits_for_a_slow_reader() -> None:
    engine = ScriptedEngine(reply=lambda _: ["x"] * 1000)

    async def ask() -> None:
        async with aclosing(merged(engine, [PROMPT])) as chunks:
            await anext(chunks)
            await asyncio.sleep(0.05)
            assert engine.under_way == 1, "a thousand pieces were taken before anybody wanted them"

    asyncio.run(ask())


def receiver(*kinds: str) -> Any:
    waiting = list(kinds)

    def receive() -> Awaitable[Message]:
        async def answer() -> Message:
            if not waiting:
                await asyncio.sleep(60)
            return {"type": waiting.pop(0)}

        return answer()

    return receive


def test_work_is_done_while_the_client_is_there() -> None:
    async def work() -> int:
        await asyncio.sleep(0.01)
        return 5

    assert asyncio.run(while_there(receiver("http.request"), work())) == 5


def test_work_ends_when_the_client_leaves() -> None:
    cleaned = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(ClientGoneError):
        asyncio.run(while_there(receiver("http.request", "http.disconnect"), work()))
    assert cleaned == [True]


def test_a_failure_of_the_work_is_its_own() -> None:
    async def work() -> None:
        raise EngineError("busy", "Full.")

    with pytest.raises(EngineError):
        asyncio.run(while_there(receiver(), work()))
