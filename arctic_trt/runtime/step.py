"""What all ranks do together at once: parts of some sequences, packed. Rank 0 decides it; the others receive it as int32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arctic_trt.runtime.communicator import Ints

CHUNK_FIELDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence.

    ``capacity`` is the length to reserve in the cache, on the sequence's first chunk, and 0 on all others. Logits are wanted
    for ``tokens[logits_from:]``.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    capacity: int
    logits_from: int

    @property
    def num_logits(self) -> int:
        return len(self.tokens) - self.logits_from


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Sequences to forget, then chunks to compute. A step without either ends the work of the followers."""

    chunks: tuple[Chunk, ...] = ()
    freed: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)

    @property
    def num_logits(self) -> int:
        return sum(chunk.num_logits for chunk in self.chunks)


END = Step()


def encode_step(step: Step) -> Ints:
    """Counts, freed sequences, the chunks' fields, then all tokens."""
    numbers = [len(step.chunks), len(step.freed), *step.freed]
    for chunk in step.chunks:
        numbers += (chunk.sequence, chunk.start, len(chunk.tokens), chunk.capacity, chunk.logits_from)
    for chunk in step.chunks:
        numbers += chunk.tokens
    return np.array(numbers, np.int32)


def decode_step(message: Ints) -> Step:
    """Inverse of :func:`encode_step`."""
    numbers = message.tolist()
    num_chunks, num_freed = numbers[:2]
    fields, tokens = 2 + num_freed, 2 + num_freed + num_chunks * CHUNK_FIELDS
    chunks = []
    for at in range(fields, tokens, CHUNK_FIELDS):
        sequence, start, count, capacity, logits_from = numbers[at : at + CHUNK_FIELDS]
        part = tuple(numbers[tokens : tokens + count])
        chunks.append(Chunk(sequence=sequence, start=start, tokens=part, capacity=capacity, logits_from=logits_from))
        tokens += count
    return Step(chunks=tuple(chunks), freed=tuple(numbers[2:fields]))
