"""Which way ranks add up a tensor: small ones through memory that all GPUs of a group reach, large ones by the library.

A decode step has 71 sums of a few KB, where nothing but latency counts. torch's symmetric memory has kernels that read the
partners' parts over NVLink by themselves, in one launch:

* *one shot*: each rank reads all parts and adds them up in rank order, which is what MPI ranks do on CPUs too. The kernel copies
  the rank's own part into the shared memory first, so that no product needs to know where its result will be read from.
* *multicast*: the switch adds up, in float32; each element is asked for by one rank and written to all. *Two shots* are the
  same without the switch, in rank order. Both are one launch between two local copies.

Each gives the same bits on every rank, which routing needs. Multicast in *one* shot need not: there each rank asks the switch for
itself. All kernels wait for their partners on the device, on the stream of the step; the second stream says nothing.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

ROOM = 32 << 20
"""Bytes of shared memory a rank; more takes NCCL no longer, or less."""
ONE_SHOT_BYTES = 1 << 20
"""Of its partners' parts, what a rank reads at most in one shot: beyond, a second round costs less (docs/cuda.md has figures)."""
TWO_SHOT_BYTES = 8 << 20
TWO_SHOT_RANKS = (2, 4, 8)
ALIGNMENT = 16
DTYPES = (torch.float32, torch.bfloat16)
OPERATIONS = ("one_shot_all_reduce_copy_out", "two_shot_all_reduce_out", "multimem_all_reduce_")


class Way(enum.Enum):
    """How a tensor is added up."""

    ONE_SHOT = "one shot"
    TWO_SHOT = "two shots"
    MULTICAST = "multicast"
    LIBRARY = "library"


def plan_sum(num_bytes: int, ranks: int, *, multicast: bool) -> Way:
    """The way of ``num_bytes`` among ``ranks`` that share memory; ``multicast`` if their switch adds up."""
    if num_bytes > ROOM or num_bytes % ALIGNMENT:
        return Way.LIBRARY
    if num_bytes * (ranks - 1) <= ONE_SHOT_BYTES:
        return Way.ONE_SHOT
    if multicast and ranks > 2:
        return Way.MULTICAST
    return Way.TWO_SHOT if num_bytes <= TWO_SHOT_BYTES and ranks in TWO_SHOT_RANKS else Way.LIBRARY


def describe_obstacle(hosts: int, links: str | None, torch_lacks: str | None) -> str | None:
    """Why GPUs of a group on ``hosts``, connected by ``links`` as :func:`query_links` says, share no memory; None if they do."""
    if torch_lacks:
        return f"torch {torch.__version__} has no {torch_lacks}"
    if hosts > 1:
        return f"a tensor-parallel group is on {hosts} hosts"
    if links is None or not links.startswith("NV") or "between all" not in links:
        return f"NVLink does not connect all GPUs ({links or 'nvidia-smi does not say what does'})"
    return None


def find_missing_operation() -> str | None:
    """What torch lacks of its operations on symmetric memory."""
    try:
        import torch.distributed._symmetric_memory
    except ImportError:
        return "symmetric memory"
    return next((name for name in OPERATIONS if not hasattr(torch.ops.symm_mem, name)), None)


class SharedSums:
    """Sums over the ranks of a group whose ``buffer``, uint8 [:data:`ROOM`], each of them reaches.

    ``operations`` are ``torch.ops.symm_mem``, ``group`` is the name under which they know the group.
    """

    def __init__(self, buffer: Tensor, group: str, ranks: int, operations: Any, *, multicast: bool) -> None:
        self._buffer, self._group, self._ranks, self._operations = buffer, group, ranks, operations
        self._multicast = multicast

    def plan(self, x: Tensor) -> Way:
        """The way of ``x``, the same on all ranks because they run the same program."""
        if x.dtype not in DTYPES or x.storage_offset() * x.element_size() % ALIGNMENT:
            return Way.LIBRARY
        return plan_sum(x.nbytes, self._ranks, multicast=self._multicast)

    def add_up(self, x: Tensor, way: Way) -> None:
        """Sum contiguous ``x`` over the group, in place, ``way`` being none of the library's."""
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if way is Way.ONE_SHOT:
            self._operations.one_shot_all_reduce_copy_out(shared, x, "sum", self._group, x)
            return
        shared.copy_(x)
        if way is Way.TWO_SHOT:
            self._operations.two_shot_all_reduce_out(shared, "sum", self._group, x)
            return
        self._operations.multimem_all_reduce_(shared, "sum", self._group)
        x.copy_(shared)


def share_memory(group: Any, ranks: int, device: torch.device) -> SharedSums:
    """Make the buffer and introduce the ranks of ``group`` to one another; all of them call it, outside of any recording.

    Raises :class:`RuntimeError` where the driver or the machine does not let them.
    """
    from torch.distributed import _symmetric_memory

    buffer = _symmetric_memory.empty(ROOM, dtype=torch.uint8, device=device)
    handle = _symmetric_memory.rendezvous(buffer, group)
    multicast = bool(handle.multicast_ptr)
    return SharedSums(buffer, group.group_name, ranks, torch.ops.symm_mem, multicast=multicast)
