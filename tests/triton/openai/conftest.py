"""Servers in front of engines that tests write."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import openai
import pytest

from arctic_trt.triton.openai.engine import Chunk
from tests.support.scripted_engine import ScriptedEngine, listening

Connect = Callable[..., openai.OpenAI]


class Passing(ScriptedEngine):
    """The engine of the test that runs."""

    engine: ScriptedEngine

    def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        return self.engine.generate(fields)

    async def ready(self) -> bool:
        return await self.engine.ready()


@pytest.fixture(scope="session")
def shared() -> Iterator[tuple[Passing, str]]:
    """A server with the usual options, and what stands for its engine."""
    passing = Passing()
    with listening(passing) as url:
        yield passing, url


@pytest.fixture
def serve(shared: tuple[Passing, str]) -> Iterator[Callable[..., str]]:
    """Put a server in front of an engine; its address. One with ``options`` is started, which takes a moment."""
    passing, url = shared
    with ExitStack() as servers:

        def served(engine: ScriptedEngine, **options: Any) -> str:
            if options:
                return servers.enter_context(listening(engine, **options))
            passing.engine = engine
            return url

        yield served


@pytest.fixture
def connect(serve: Callable[..., str]) -> Iterator[Connect]:
    """The official client, connected to a server in front of an engine."""
    with ExitStack() as clients:

        def connected(engine: ScriptedEngine, *, key: str = "any", **options: Any) -> openai.OpenAI:
            url = f"{serve(engine, **options)}/v1"
            return clients.enter_context(openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=20))

        yield connected
