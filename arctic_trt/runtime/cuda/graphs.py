"""Decode steps as CUDA graphs: for how many sequences they are recorded, and how, in memory that all of them share.

They are recorded before the first request, the largest first: what does not fit fails at the start, and no request waits for a
recording. Only one is replayed at a time, so that all can keep what lies between input and result in the same place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from arctic_trt.errors import RefusedError

STEP = 8
"""From twice this many sequences on, graphs are at least this far apart."""
SHARE = 4
"""Between a power of two and the next there are so many graphs, so that a step is filled up by a quarter at most."""
REPORT_S = 5.0
LESS_CACHE = "Give the cache less with --kv_cache_memory, or build the engine with a smaller --max_batch_size."

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recorded(Generic[Result]):
    """A CUDA graph and what it leaves each time that it is replayed."""

    graph: torch.cuda.CUDAGraph
    result: Result


def graph_sizes(most: int) -> list[int]:
    """For how many sequences decode steps are recorded, where there are never more than ``most``, ascending.

    1, 2, 4, 8, 16, 24, ..., 64, 80, ..., 128, 160, ...: what is filled up costs sums over the ranks and rows of products.
    """
    sizes = [size for size in (1, 2, 4, STEP) if size < most]
    size = 2 * STEP
    while size < most:
        sizes.append(size)
        size += max(STEP, (1 << (size.bit_length() - 1)) // SHARE)
    return [*sizes, most]


def record(
    sizes: Sequence[int], make: Callable[[int], Callable[[], Result]], device: torch.device
) -> dict[int, Recorded[Result]]:
    """Record the work that ``make(size)`` returns, for each of ``sizes``; all ranks do so together.

    Work is done twice before it is recorded, for kernels to be compiled and chosen, and must launch the same each time. Raises
    :class:`RefusedError` where the device has not the memory.
    """
    if not sizes:
        return {}
    began = reported = time.monotonic()
    free = torch.cuda.mem_get_info(device)[0]
    pool = torch.cuda.graph_pool_handle()
    recorded: dict[int, Recorded[Result]] = {}
    for size in sorted(sizes, reverse=True):
        with out_of_memory_is_refused(f"Recording a step of {size} sequences", device):
            recorded[size] = _record(make(size), pool, device)
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            logger.info("%d of %d sizes of decode steps are recorded.", len(recorded), len(sizes))
    taken = free - torch.cuda.mem_get_info(device)[0]
    logger.info(
        "Decode steps are recorded for %d sizes, up to %d sequences, in %.1f s; they take %.2f GB.",
        *(len(sizes), max(sizes), time.monotonic() - began, taken / 1e9),
    )
    return recorded


@contextmanager
def out_of_memory_is_refused(
    what: str, device: torch.device, beside: str = " beside the weights and the KV cache", advice: str = LESS_CACHE
) -> Iterator[None]:
    """Raise :class:`RefusedError` where ``what`` finds no memory, whether torch looked for it or a library."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        free, total = torch.cuda.mem_get_info(device)
        raise RefusedError(
            f"{what} does not fit into GPU {device.index}{beside}: of {total / 1e9:.1f} GB {free / 1e9:.2f} are left.",
            advice,
        ) from None


def _record(work: Callable[[], Result], pool: Any, device: torch.device) -> Recorded[Result]:
    current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(2):
            work()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls count: NCCL's watchdog looks after earlier work meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = work()
    return Recorded(graph, result)
