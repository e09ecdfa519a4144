"""What the front end needs of an engine: answers as chunks of text. Triton is one; tests have another."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FailureKind = Literal["invalid", "busy", "unavailable", "internal"]


class EngineError(Exception):
    """A request that failed, in one sentence.

    ``kind``: ``invalid`` is the client's fault, ``busy`` says that queues are full, ``unavailable`` that it may work later.
    """

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class NamedLogprobs:
    """A generated token's text and the natural logarithm of its probability; ``top`` has the same of the likeliest ones."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What is new of one choice, counted from 0. ``text`` never ends within a character.

    ``num_tokens`` were generated for it, ``prompt_tokens`` are those of the whole prompt, ``finish_reason`` is None until the
    choice's last chunk, ``logprobs`` is None unless they were asked for.
    """

    choice: int = 0
    text: str
    num_tokens: int
    prompt_tokens: int
    finish_reason: str | None = None
    logprobs: tuple[NamedLogprobs, ...] | None = None


class Engine(Protocol):
    """Something that generates."""

    def generate(self, fields: Mapping[str, Any]) -> AsyncGenerator[Chunk, None]:
        """Answer one prompt. Closing the generator cancels the request.

        ``fields`` are those of a batch job's line: ``prompt`` (a text or token ids) or ``messages``, ``n``, ``max_tokens``,
        ``temperature`` and so on, ``stop`` a list; ``logprobs`` is the number of alternatives, ``stream`` says whether to answer
        while generating, ``ignore_eos`` that no token ends the output. What is not there has the engine's default.

        Raises :class:`EngineError`, before the first chunk or after it.
        """
        ...

    async def ready(self) -> bool:
        """Whether a request would be answered."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
