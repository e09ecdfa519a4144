"""What all ranks do together at once: parts of some sequences, packed. Rank 0 decides it; the others receive it as int32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # servers and their clients need no torch
    from arctic_trt.engine.config import BuildConfig
    from arctic_trt.runtime.communicator import Ints

CHUNK_FIELDS = 6
CHOICE_INTS = 10
"""A choice is five numbers of 64 bits."""
NO_CHOICE, THE_LIKELIEST, DRAWN = range(3)
UNKNOWN = -1
"""In place of a token: the one that the ranks chose for the sequence in the step before, of which rank 0 has not heard yet."""

STEP_TOKENS = 1024
"""Of a step on CPUs, at most, unless more sequences decode: more would only take memory, weights are not the bound any more."""


def most_step_tokens(limits: BuildConfig, step_tokens: int) -> int:
    """Tokens of the largest step that is asked for: ``step_tokens``, more if so many sequences may decode at once."""
    return min(limits.max_num_tokens, max(step_tokens, limits.max_batch_size))


class Choice(NamedTuple):
    """How the ranks choose a sequence's next token by themselves, as :mod:`arctic_trt.runtime.sampler` would.

    Off are ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0; a ``temperature`` of 0 takes the likeliest token. ``uniform`` is the random
    number, from 0 to 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


LIKELIEST = Choice(temperature=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence.

    ``blocks`` of the cache become the sequence's, after those that it has. Logits are wanted for ``tokens[logits_from:]``, unless
    the ranks choose the next token by ``choice``: then they are wanted by nobody else, and only the last token's.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    logits_from: int
    choice: Choice | None = None

    @property
    def num_logits(self) -> int:
        return len(self.tokens) - self.logits_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Sequences that lose their blocks, then chunks to compute. A step without either ends the work of the followers."""

    chunks: tuple[Chunk, ...] = ()
    freed: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        return sum(chunk.num_logits for chunk in self.chunks)

    @property
    def num_choices(self) -> int:
        """Tokens that the ranks choose."""
        return sum(chunk.choice is not None for chunk in self.chunks)

    @property
    def foreseen(self) -> bool:
        """Nobody needs its logits: what comes after it can be decided before they are there."""
        return all(chunk.choice is not None or not chunk.num_logits for chunk in self.chunks)


END = Step()


def encode_step(step: Step) -> Ints:
    """Counts, freed sequences, the chunks' fields, the tokens and blocks of each, and the choices but the likeliest token."""
    numbers, drawn = [len(step.chunks), len(step.freed), *step.freed], []
    for chunk in step.chunks:
        kind = _kind(chunk.choice)
        numbers += (chunk.sequence, chunk.start, len(chunk.tokens), len(chunk.blocks), chunk.logits_from, kind)
        if kind == DRAWN:
            drawn.append(chunk.choice)
    for chunk in step.chunks:
        numbers += chunk.tokens
        numbers += chunk.blocks
    message = np.array(numbers, np.int32)
    return np.concatenate((message, np.array(drawn, np.float64).view(np.int32).ravel())) if drawn else message


def decode_step(message: Ints) -> Step:
    """Inverse of :func:`encode_step`."""
    numbers = message.tolist()
    num_chunks, num_freed = numbers[:2]
    fields, at = 2 + num_freed, 2 + num_freed + num_chunks * CHUNK_FIELDS
    drawn = numbers[fields + CHUNK_FIELDS - 1 : at : CHUNK_FIELDS].count(DRAWN)
    choice_values = message[len(message) - drawn * CHOICE_INTS :].view(np.float64).reshape(drawn, -1).tolist() if drawn else []
    choices = map(Choice._make, choice_values)
    chunks = []
    for field in range(fields, at, CHUNK_FIELDS):
        sequence, start, num_tokens, num_blocks, logits_from, kind = numbers[field : field + CHUNK_FIELDS]
        tokens, blocks = numbers[at : at + num_tokens], numbers[at + num_tokens : at + num_tokens + num_blocks]
        at += num_tokens + num_blocks
        chunks.append(
            Chunk(
                sequence=sequence,
                start=start,
                tokens=tuple(tokens),
                blocks=tuple(blocks),
                logits_from=logits_from,
                choice=next(choices) if kind == DRAWN else LIKELIEST if kind == THE_LIKELIEST else None,
            )
        )
    return Step(chunks=tuple(chunks), freed=tuple(numbers[2:fields]))


def _kind(choice: Choice | None) -> int:
    if choice is None:
        return NO_CHOICE
    return THE_LIKELIEST if choice is LIKELIEST else DRAWN
