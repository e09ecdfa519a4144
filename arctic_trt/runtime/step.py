"""What all ranks do together at once: parts of some sequences, packed. Rank 0 decides it; the others receive it as int32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arctic_trt.runtime.communicator import Ints

CHUNK_FIELDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence.

    ``blocks`` of the cache become the sequence's, after those that it has. Logits are wanted for ``tokens[logits_from:]``.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    logits_from: int

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


END = Step()


def encode_step(step: Step) -> Ints:
    """Counts, freed sequences, the chunks' fields, then the tokens and blocks of each."""
    numbers = [len(step.chunks), len(step.freed), *step.freed]
    for chunk in step.chunks:
        numbers += (chunk.sequence, chunk.start, len(chunk.tokens), len(chunk.blocks), chunk.logits_from)
    for chunk in step.chunks:
        numbers += (*chunk.tokens, *chunk.blocks)
    return np.array(numbers, np.int32)


def decode_step(message: Ints) -> Step:
    """Inverse of :func:`encode_step`."""
    numbers = message.tolist()
    num_chunks, num_freed = numbers[:2]
    fields, at = 2 + num_freed, 2 + num_freed + num_chunks * CHUNK_FIELDS
    chunks = []
    for field in range(fields, at, CHUNK_FIELDS):
        sequence, start, num_tokens, num_blocks, logits_from = numbers[field : field + CHUNK_FIELDS]
        tokens, blocks = numbers[at : at + num_tokens], numbers[at + num_tokens : at + num_tokens + num_blocks]
        at += num_tokens + num_blocks
        chunks.append(Chunk(sequence=sequence, start=start, tokens=tuple(tokens), blocks=tuple(blocks), logits_from=logits_from))
    return Step(chunks=tuple(chunks), freed=tuple(numbers[2:fields]))
