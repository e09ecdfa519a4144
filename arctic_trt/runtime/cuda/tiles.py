"""How products are cut into programs of a GPU, and what of it decides about speed.

A step of few rows takes as long as its weights take to arrive. A GPU has a latency of about 700 ns and brings up to 4.8 TB/s, so
that 3.4 MB must be on their way at any moment, 25 KB for each of its processors. A program asks for ``buffers`` blocks of its
rows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""
SMALLEST = 16
"""Rows of a matrix that tensor cores take at least; blocks of up to so many rows wait for the weights."""
WARPS = 4
PARTS = 8
"""Sums of their own of a program of few rows, two a warp: products on the tensor cores need not wait for one another."""
SHARED_BYTES = 72 << 10
"""Shared memory of a program of few rows at most, so that a multiprocessor's 227 KB hold three."""
SHORT_BYTES = 1024
"""Rows of weights up to this long are read in blocks of half the length, of which they leave less unused."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of ``project_kernel`` works on, and with how many warps and stages."""

    rows: int
    columns: int
    length: int
    warps: int = 4
    stages: int = 4


@dataclass(frozen=True, slots=True)
class SkinnyTile:
    """A program of ``skinny_kernel`` multiplies ``rows`` rows with ``columns`` rows of the weight.

    Each of its sums has ``length`` elements of every block; ``buffers`` blocks lie in shared memory.
    """

    rows: int
    columns: int
    length: int
    buffers: int


def plan_tile(rows: int, gated: bool) -> Tile:
    """For many rows, which want large tiles."""
    if rows <= 64:
        return Tile(power_of_2(rows), 32, 128)
    return Tile(128, 64 if gated else 128, 128, warps=8, stages=3)


def plan_skinny_tile(rows: int, weight_rows: int, length: int, itemsize: int, blocks: int) -> SkinnyTile:
    """For up to :data:`SMALLEST` rows in each of ``blocks``; elements of ``length`` have ``itemsize`` bytes.

    Programs are at least as many as processors, if that can be had.
    """
    short = length * itemsize <= SHORT_BYTES
    tokens, columns = (8 if rows <= 8 else 16), (32 if short else 16)
    while columns > 8 and -(-weight_rows // columns) * blocks < PROCESSORS:
        columns //= 2
    part_bytes = 32 if short else 64
    buffers = SHARED_BYTES // ((columns + tokens) * PARTS * part_bytes)
    return SkinnyTile(tokens, columns, part_bytes // itemsize, min(buffers, -(-length * itemsize // (PARTS * part_bytes))))


def expert_block(slots: int, experts: int) -> int:
    """Slots of a block: about what an expert gets, within what tensor cores take."""
    return min(128, max(SMALLEST, power_of_2(slots // experts)))


def power_of_2(count: int) -> int:
    """The smallest that is not less."""
    return 1 << max(0, count - 1).bit_length()
