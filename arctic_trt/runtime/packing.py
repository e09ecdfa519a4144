"""A step as tensors: its chunks side by side, with where the cache keeps what belongs to them.

Legend: T tokens of the step, C chunks, M blocks of the longest sequence, H head dim, W positions whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from arctic_trt.runtime.kernels import Tables
from arctic_trt.runtime.kv_cache import KvCache
from arctic_trt.runtime.step import Step

Rotary = tuple[Tensor, Tensor]
"""cos and sin, [positions, H] each."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A step as tensors; cos and sin [T, 1, H] broadcast over heads, ``wanted_W`` indexes the packed tokens.

    ``slot_T`` is where the cache stores each token's keys and values, ``tables`` where their sequences' are.
    """

    token_T: Tensor
    wanted_W: Tensor
    slot_T: Tensor
    tables: Tables
    cos: Tensor
    sin: Tensor


def pack(step: Step, cache: KvCache, rotary: Rotary) -> Packed:
    """Lay a step's chunks side by side; ``cache`` has the blocks of their sequences, ``rotary`` a row for every position."""
    tokens: list[int] = []
    wanted: list[int] = []
    for chunk in step.chunks:
        wanted.extend(range(len(tokens) + chunk.logits_from, len(tokens) + len(chunk.tokens)))
        tokens.extend(chunk.tokens)
    start_C = np.array([chunk.start for chunk in step.chunks], np.int32)
    count_C = np.array([len(chunk.tokens) for chunk in step.chunks], np.int32)
    block_CM = _blocks(step, cache)
    # numpy takes a fifth of torch's time for arrays as small as these
    position_T = np.arange(len(tokens)) + np.repeat(start_C - (count_C.cumsum() - count_C), count_C)
    chunk_T, size = np.repeat(np.arange(len(count_C)), count_C), cache.room.block_tokens
    slot_T = block_CM[chunk_T, position_T // size].astype(np.int64) * size + position_T % size
    position = torch.from_numpy(position_T)
    return Packed(
        torch.tensor(tokens),
        torch.tensor(wanted, dtype=torch.int64),
        torch.from_numpy(slot_T),
        Tables(torch.from_numpy(start_C), torch.from_numpy(count_C), torch.from_numpy(block_CM)),
        *(table.index_select(0, position)[:, None] for table in rotary),
    )


def _blocks(step: Step, cache: KvCache) -> npt.NDArray[np.int32]:
    """The blocks of each chunk's sequence [C, M], padded with 0."""
    used = [cache.tables[chunk.sequence] for chunk in step.chunks]
    block_CM = np.zeros((len(used), max(map(len, used))), np.int32)
    for row, blocks in enumerate(used):
        block_CM[row, : len(blocks)] = blocks
    return block_CM
