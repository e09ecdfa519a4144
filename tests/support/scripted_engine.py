"""An engine whose answers a test writes, and OpenAI's interface in front of it, listening at a port of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from arctic_trt.triton.openai.app import make_app
from arctic_trt.triton.openai.engine import Chunk, EngineError, NamedLogprobs
from arctic_trt.triton.openai.options import OpenAiOptions

PIECES = ["The ", "future ", "is ", "open."]
Reply = Callable[[Mapping[str, Any]], list[str]]


def scored(piece: str, alternatives: int) -> NamedLogprobs:
    """Made-up log probabilities: the likeliest token is always the chosen one."""
    return NamedLogprobs(
        piece, -0.5, tuple((piece if rank == 0 else f"other{rank}", -0.5 - rank) for rank in range(alternatives))
    )


@dataclass
class ScriptedEngine:
    """A piece of ``reply`` is a token and takes ``delay_s``; choices take turns.

    With ``failure`` it fails after ``pieces_first`` pieces.
    """

    reply: Reply = lambda fields: PIECES
    delay_s: float = 0.0
    failure: Exception | None = None
    pieces_first: int = 0
    is_ready: bool = True
    finishes: bool = True
    asked: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    cancelled: int = 0

    async def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        self.asked.append(dict(fields))
        self.under_way += 1
        finished = False
        try:
            async for chunk in self._chunks(fields):
                yield chunk
            finished = True
        except EngineError:
            finished = True
            raise
        finally:
            self.under_way -= 1
            self.cancelled += not finished

    async def _chunks(self, fields: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        pieces = self.reply(fields)[: fields.get("max_tokens")]
        reason = "length" if len(pieces) == fields.get("max_tokens") else "stop"
        alternatives = fields.get("logprobs")
        groups = [[piece] for piece in pieces] if fields["stream"] else [pieces]
        for number, group in enumerate(groups):
            if self.failure and number >= self.pieces_first:
                raise self.failure
            await asyncio.sleep(self.delay_s * len(group))
            for choice in range(fields["n"]):
                yield Chunk(
                    choice=choice,
                    text="".join(group),
                    num_tokens=len(group),
                    prompt_tokens=5,
                    finish_reason=reason if self.finishes and number == len(groups) - 1 else None,
                    logprobs=None if alternatives is None else tuple(scored(piece, alternatives) for piece in group),
                )

    async def ready(self) -> bool:
        return self.is_ready

    async def close(self) -> None:
        pass

    def wait_until(self, condition: Callable[[ScriptedEngine], bool], patience_s: float = 10.0) -> None:
        """Return when ``condition`` holds, from another thread than the engine's."""
        deadline = time.monotonic() + patience_s
        while not condition(self):
            assert time.monotonic() < deadline, f"after {patience_s} s: {self}"
            time.sleep(0.005)


@contextmanager
def listening(engine: ScriptedEngine, **options: Any) -> Iterator[str]:
    """The address of a server in front of ``engine``, in a thread of this process."""
    app = make_app(OpenAiOptions(grpc_url="nowhere:1", **options), engine)
    config = uvicorn.Config(app, port=0, http="h11", ws="none", loop="asyncio", log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()
