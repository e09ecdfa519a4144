"""A step as integers in one array, which reaches the device in one copy, at places that a CUDA graph can rely on.

Legend: T tokens, W positions whose logits are wanted, K choices, C chunks, R blocks of rows, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arctic_trt.runtime.cuda.ops import AttentionRows
from arctic_trt.runtime.kernels import Tables
from arctic_trt.runtime.step import CHOICE_INTS, UNKNOWN, Step

Ints = npt.NDArray[np.int32]
SPLIT_PROGRAMS = 256
"""About as many programs as keep a GPU's processors busy: a step of few sequences cuts their positions into parts."""
MAX_SPLITS = 16
PREFILL_ROWS = 64
"""Query rows, tokens times heads, that a program of attention takes; a single token's heads where no chunk has more."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many integers of each kind a step has, and how its attention is cut."""

    choices: int
    tokens: int
    wanted: int
    chunks: int
    rows: int
    width: int
    row_tokens: int
    splits: int
    single: bool

    @property
    def fields(self) -> list[tuple[str, int]]:
        """Names and sizes in the order in which they lie; the first ones are numbers of 64 bits."""
        per_token = [(name, self.tokens) for name in ("token", "position", "slot")]
        per_chunk = [(name, self.chunks) for name in ("start", "count", "first")]
        per_row = [(name, self.rows) for name in ("chunk", "offset")]
        per_choice = [("choice", CHOICE_INTS * self.choices), ("row", self.choices)]
        return [*per_choice, *per_token, ("wanted", self.wanted), *per_chunk, *per_row, ("block", self.chunks * self.width)]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.fields)


@dataclass(frozen=True, slots=True)
class Staged:
    """A step on the device: views of one array, all int32 but for the choices, float64 [K, 5], by rows ``row_K`` of the logits.

    A token below 0 is the one that the step before chose at place -1 - token.
    """

    choice_KF: Tensor
    row_K: Tensor
    token_T: Tensor
    position_T: Tensor
    slot_T: Tensor
    wanted_W: Tensor
    rows: AttentionRows


def plan_layout(step: Step, group: int, kv_heads: int, width: int) -> Layout:
    """The layout of a step as it is; ``group`` query heads share a KV head, sequences have ``width`` blocks at most."""
    counts = [len(chunk.tokens) for chunk in step.chunks]
    single = max(counts) == 1
    row_tokens = 1 if single else max(1, PREFILL_ROWS // group)
    rows = sum(-(-count // row_tokens) for count in counts)
    splits = _splits(rows * kv_heads, width)
    choices, wanted = step.num_choices, step.num_logits
    return Layout(choices, step.num_tokens, wanted, len(counts), rows, width, row_tokens, splits, single)


def plan_decode_layout(sequences: int, group: int, kv_heads: int, width: int) -> Layout:
    """The layout of a step that takes one token of each of ``sequences``, and wants the logits of each or a choice by them."""
    return Layout(*(sequences,) * 5, width, 1, _splits(sequences * kv_heads, width), single=True)


def _splits(programs: int, width: int) -> int:
    return max(1, min(MAX_SPLITS, SPLIT_PROGRAMS // programs, width))


def fill(
    out: Ints,
    layout: Layout,
    step: Step,
    chosen: Mapping[int, int],
    tables: Mapping[int, Sequence[int]],
    block_tokens: int,
    spare_slot: int,
) -> None:
    """Write ``step`` into ``out`` [layout.size].

    ``chosen`` says at which place the step before chose a sequence's token, ``tables`` has the blocks of each sequence. What the
    step has less than the layout are sequences of token 0 alone, which have the block of ``spare_slot`` in common: rows of
    nobody, but like any other, which choose the same few experts; and choices of the first row's likeliest token.
    """
    views = {name: out[place] for name, place in _places(layout).items()}
    count_C = np.array([len(chunk.tokens) for chunk in step.chunks], np.int32)
    start_C = np.array([chunk.start for chunk in step.chunks], np.int32)
    first_C = count_C.cumsum(dtype=np.int32) - count_C
    out[:] = 0
    views["slot"][:] = spare_slot
    block_CM = views["block"].reshape(layout.chunks, layout.width)
    for row, chunk in enumerate(step.chunks):
        blocks = tables[chunk.sequence]
        block_CM[row, : len(blocks)] = blocks
    tokens, chunks = step.num_tokens, len(count_C)
    chunk_T = np.repeat(np.arange(chunks), count_C)
    position_T = np.arange(tokens) + (start_C - first_C)[chunk_T]
    views["token"][:tokens] = [
        -1 - chosen[chunk.sequence] if token == UNKNOWN else token for chunk in step.chunks for token in chunk.tokens
    ]
    _fill_choices(views, step)
    views["position"][:tokens] = position_T
    views["slot"][:tokens] = block_CM[chunk_T, position_T // block_tokens] * block_tokens + position_T % block_tokens
    from_C = first_C + [chunk.logits_from for chunk in step.chunks]
    views["wanted"][: step.num_logits] = np.flatnonzero(np.arange(tokens) >= from_C[chunk_T])
    views["start"][:chunks], views["count"][:chunks], views["first"][:chunks] = start_C, count_C, first_C
    nobodys = np.arange(chunks, layout.chunks)
    views["count"][nobodys], views["first"][nobodys] = 1, tokens + nobodys - chunks
    block_CM[nobodys, 0] = spare_slot // block_tokens
    rows_C = -(-count_C // layout.row_tokens)
    chunk_R = np.repeat(np.arange(chunks), rows_C)
    rows = len(chunk_R)
    views["chunk"][:rows] = chunk_R
    views["offset"][:rows] = (np.arange(rows) - (rows_C.cumsum() - rows_C)[chunk_R]) * layout.row_tokens
    views["chunk"][rows:] = nobodys


def staged(array: Tensor, layout: Layout) -> Staged:
    """The views of a step that lies in ``array``, int32 [layout.size] on the device."""
    views = {name: array[place] for name, place in _places(layout).items()}
    tables = Tables(views["start"], views["count"], views["block"].view(layout.chunks, layout.width))
    rows = AttentionRows(tables, views["first"], views["chunk"], views["offset"], layout.row_tokens, layout.splits, layout.single)
    choice_KF = views["choice"].view(torch.float64).view(layout.choices, CHOICE_INTS // 2)
    return Staged(choice_KF, views["row"], views["token"], views["position"], views["slot"], views["wanted"], rows)


def places_of_choices(step: Step) -> dict[int, int]:
    """At which place of a step's choices each sequence's is."""
    return {chunk.sequence: place for place, chunk in enumerate(chunk for chunk in step.chunks if chunk.choice is not None)}


def _fill_choices(views: dict[str, Ints], step: Step) -> None:
    ends = accumulate(chunk.num_logits for chunk in step.chunks)
    choosing = [(end - 1, chunk.choice) for end, chunk in zip(ends, step.chunks, strict=True) if chunk.choice is not None]
    if choosing:
        rows, choices = zip(*choosing, strict=True)
        views["row"][: len(rows)] = rows
        views["choice"][: len(rows) * CHOICE_INTS] = np.array(choices, np.float64).view(np.int32).ravel()


class Staging:
    """Host memory for steps: two arrays by turns, because the device may not have read the step before yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays = [staging_buffer(0, device) for _ in range(2)]
        self._read = [torch.cuda.Event() if device.type == "cuda" else None for _ in range(2)]
        self._turn = 0

    def take(self, size: int) -> Tensor:
        """An array int32 [size] that the device does not read any more."""
        self._turn = 1 - self._turn
        read = self._read[self._turn]
        if read is not None and not read.query():
            read.synchronize()
        if len(self._arrays[self._turn]) < size:
            self._arrays[self._turn] = staging_buffer(size, self._device)
        return self._arrays[self._turn][:size]

    def sent(self) -> None:
        """The device has been asked to read the array that was taken."""
        read = self._read[self._turn]
        if read is not None:
            read.record()


def staging_buffer(size: int, device: torch.device) -> Tensor:
    """Host memory from which a copy to ``device`` needs no other copy."""
    return torch.empty(size, dtype=torch.int32, pin_memory=device.type == "cuda")


@lru_cache(maxsize=64)
def _places(layout: Layout) -> dict[str, slice]:
    ends = accumulate(size for _, size in layout.fields)
    return {name: slice(end - size, end) for (name, size), end in zip(layout.fields, ends, strict=True)}
