"""How much room the KV cache gets, and whether a request can ever fit into it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import available_memory
from arctic_trt.runtime.blocks import BLOCK_TOKENS, KvRoom
from arctic_trt.runtime.requests import Request

FREE_SHARE = 0.5
"""Of the memory that is free once the weights are loaded, for the caches of all ranks of a host together."""
GPU_SHARE = 0.85
"""Of what is free on a GPU once it has the weights; a step's own memory comes out of the rest."""
MORE_ROOM = "Give it more with --kv_cache_memory or --max_tokens_in_paged_kv_cache"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBudget:
    """What was asked for: ``memory_bytes`` a rank, ``max_tokens`` in all; None leaves it to the engine and the machine."""

    memory_bytes: int | None = None
    max_tokens: int | None = None


def room_for(limits: BuildConfig) -> KvRoom:
    """Room for the longest sequences, as many as an engine takes at once."""
    return KvRoom(min(limits.max_batch_size, limits.max_num_tokens) * KvRoom(0).blocks_for(limits.max_seq_len))


def plan_room(budget: KvBudget, limits: BuildConfig, block_bytes: int, free: Callable[[], int | None]) -> KvRoom:
    """What a rank can give, of which the cache may take the ``free`` bytes, None if nobody knows; ``block_bytes`` a block.

    Memory or tokens that were asked for are an upper bound each. Unless tokens or memory were asked for, more than
    :func:`room_for` is not needed; unless memory was, ``free`` is asked and kept to.
    """
    bounds = []
    if budget.max_tokens is not None:
        bounds.append(budget.max_tokens // BLOCK_TOKENS)
    elif budget.memory_bytes is None:
        bounds.append(room_for(limits).num_blocks)
    memory = free() if budget.memory_bytes is None else budget.memory_bytes
    if memory is not None:
        bounds.append(memory // block_bytes)
    return KvRoom(max(0, min(bounds)))


def check_room(room: KvRoom, block_bytes: int) -> None:
    """Raise :class:`UsageError` for a cache that cannot hold anything."""
    if not room.num_blocks:
        raise UsageError(
            f"The KV cache has no room for a single block of {room.block_tokens} tokens, which takes {block_bytes} bytes a rank.",
            f"{MORE_ROOM}.",
        )


def check_fits(request: Request, room: KvRoom) -> None:
    """Raise :class:`UsageError` for a request that the cache could not hold even if it were alone."""
    if room.blocks_for(request.num_cached) > room.num_blocks:
        raise UsageError(
            f"Prompt {request.index} has {len(request.prompt)} tokens, which with {request.max_new_tokens} of output exceeds the "
            f"KV cache of {room.num_tokens} tokens.",
            f"{MORE_ROOM}, or ask for less.",
        )


def free_on_gpu(device: torch.device) -> int:
    """What the cache of a rank may take of its GPU: :data:`GPU_SHARE` of what is free."""
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])


def free_on_host(local_ranks: int) -> int | None:
    """What the cache of one of a host's ranks may take of its memory, None with a warning where that is not known."""
    try:
        return int(FREE_SHARE * available_memory() / local_ranks)
    except RefusedError as error:
        logger.warning(
            "%s The KV cache may grow to what the engine's limits allow: bound it with --kv_cache_memory.", error.message
        )
        return None
