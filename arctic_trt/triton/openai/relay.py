"""Between an engine and a client: several prompts as one stream, and an end for what nobody waits for any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from arctic_trt.triton.openai.engine import Chunk, Engine

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Result = TypeVar("Result")
WAITING_CHUNKS = 32
"""What may wait for a slow client before the engine's stream is left to wait."""


class ClientGoneError(Exception):
    """The client has left before it had its answer."""


async def merged(engine: Engine, prompts: Sequence[Mapping[str, Any]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """(number of the prompt, chunk) of all prompts as they come.

    The first failure ends all of them and is raised; so does closing the generator, which cancels the requests.
    """
    queue: asyncio.Queue[tuple[int, Chunk] | Exception | None] = asyncio.Queue(WAITING_CHUNKS)

    async def pump(number: int, fields: Mapping[str, Any]) -> None:
        end = None
        try:
            async with aclosing(engine.generate(fields)) as chunks:
                async for chunk in chunks:
                    await queue.put((number, chunk))
        except Exception as error:  # whatever it is, whoever waits at the other end must hear of it
            end = error
        await queue.put(end)

    pumps = [asyncio.create_task(pump(number, fields)) for number, fields in enumerate(prompts)]
    under_way = len(pumps)
    try:
        while under_way:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                under_way -= 1
            else:
                yield item
    finally:
        await _end(*pumps)


async def while_there(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client leaves; raises :class:`ClientGoneError` then.

    ``receive`` has given the whole body already, so that a disconnection is all it has left to say.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _end(task, gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel ``tasks`` and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
