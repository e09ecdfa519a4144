"""What ranks say to each other on GPUs: tensors go from device to device, everything else over MPI as on the CPU.

Sums are the same bits on every rank of a group, which is all that routing needs: :mod:`arctic_trt.runtime.cuda.sums` says how for
small ones, NCCL does the others.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import torch
from torch import Tensor

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import query_links
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import Communicator, Ints, agreement
from arctic_trt.runtime.cuda.meeting import join
from arctic_trt.runtime.cuda.sums import SharedSums, Way, describe_obstacle, find_missing_operation, share_memory

NCCL = "nccl"
SUMS = "ARCTIC_TRT_GPU_SUMS"
AUTO = "auto"
REHEARSED_BYTES = (1 << 10, 4 << 20, 64 << 20)
"""Tensors whose sums take each way that there may be."""

logger = logging.getLogger(__name__)


class DeviceCommunicator:
    """A rank of ``mapping``'s world: control by ``control``, tensors by torch.distributed with ``backend``.

    See :class:`arctic_trt.runtime.communicator.Communicator`; every rank makes one at the same time. No call waits for the
    device, so that all may be recorded in a CUDA graph. Raises :class:`RefusedError` on all ranks where some cannot join, or
    where sums come out wrong.
    """

    def __init__(self, control: Communicator, mapping: Mapping, device: torch.device, backend: str = NCCL) -> None:
        from torch import distributed

        self.rank, self.world_size = control.rank, control.world_size
        self._control, self._device, self._size = control, device, mapping.tp_size
        self._distributed: Any = distributed
        self._gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor  # its name to 2.12
        self._listener = join(control, device, backend)
        stages = [range(first, first + self._size) for first in range(0, self.world_size, self._size)]
        groups = [distributed.new_group(list(stage)) for stage in stages]  # every rank takes part in making each
        self._group: Any = groups[self.rank // self._size]
        self._sums = self._share() if device.type == "cuda" and self._size > 1 else None
        wrong = self._rehearse()
        with agreement(control):
            if wrong:
                raise RefusedError(
                    f"Sums of {' and '.join(map(str, wrong))} bytes over {self._size} ranks come out wrong on "
                    f"{socket.gethostname()}, {device}.",
                    f"{SUMS}=nccl leaves all of them to NCCL; NCCL_DEBUG=INFO says what it does.",
                )

    def all_reduce(self, x: Tensor) -> None:
        if self._size == 1:
            return
        way = Way.LIBRARY if self._sums is None else self._sums.plan(x)
        if self._sums is None or way is Way.LIBRARY:
            self._distributed.all_reduce(x, group=self._group)
        else:
            self._sums.add_up(x, way)

    def all_gather(self, x_TV: Tensor) -> Tensor:
        if self._size == 1:
            return x_TV
        parts = torch.empty(self._size * len(x_TV), x_TV.shape[1], dtype=x_TV.dtype, device=self._device)
        self._gather(parts, x_TV.contiguous(), group=self._group)
        return parts.view(self._size, *x_TV.shape).transpose(0, 1).reshape(len(x_TV), -1)

    def send(self, x: Tensor, rank: int) -> None:
        self._distributed.send(x.contiguous(), rank)

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        x = torch.empty(shape, device=self._device)
        self._distributed.recv(x, rank)
        return x

    def broadcast(self, values: Ints | None) -> Ints:
        return self._control.broadcast(values)

    def gather_all(self, value: Any) -> list[Any]:
        return self._control.gather_all(value)

    def close(self) -> None:
        """Leave the others, all ranks together; recorded graphs have to be gone, for NCCL waits for them."""
        self._sums = None
        self._distributed.destroy_process_group()
        self.gather_all(None)  # until all have left, their threads ask rank 0's listener
        self._listener = None

    def _share(self) -> SharedSums | None:
        """Memory in common where all groups can have it, otherwise None, with a warning from rank 0."""
        asked = check_sums(self.gather_all(os.environ.get(SUMS, AUTO))[0])
        hosts = self.gather_all(socket.gethostname())
        spread = max(len(set(hosts[first : first + self._size])) for first in range(0, self.world_size, self._size))
        links = query_links() if self.rank == 0 and asked == AUTO else None
        obstacle = self.gather_all(describe_obstacle(spread, links, find_missing_operation()))[0]
        if asked == NCCL:
            return None
        shared: SharedSums | None = None
        failure: str | None = None
        if obstacle is None:
            try:
                shared = share_memory(self._group, self._size, self._device)
            except RuntimeError as error:
                failure = str(error).partition("\n")[0]
            obstacle = next((each for each in self.gather_all(failure) if each), None)
        if obstacle is None:
            return shared
        if self.rank == 0:
            logger.warning("Small sums take NCCL's way, which takes longer: %s.", obstacle)
        return None

    def _rehearse(self) -> list[int]:
        """Make each connection once, before memory is shared out and graphs are recorded.

        Returns the bytes of sums that are wrong, or not the same bits on all ranks of a group.
        """
        place, ranks, wrong = self.rank % self._size, self._size, []
        for size in REHEARSED_BYTES if self._device.type == "cuda" else REHEARSED_BYTES[:1]:
            pattern = torch.arange(size // 4, device=self._device).remainder(1000) / 7
            x = pattern * (place + 1)
            self.all_reduce(x)
            digests = self.gather_all(int(x.view(torch.int32).sum(dtype=torch.int64)))
            right = torch.allclose(x, pattern * (ranks * (ranks + 1) / 2), rtol=1e-5)
            if not right or len(set(digests[self.rank - place :][:ranks])) > 1:
                wrong.append(size)
        self.all_gather(torch.zeros(1, 1, device=self._device))
        for here, there in self._neighbours():
            if self.rank == here:
                self.send(torch.zeros(1, device=self._device), there)
            elif self.rank == there:
                self.receive((1,), here)
        return wrong

    def _neighbours(self) -> list[tuple[int, int]]:
        """Ranks between which hidden states go, and what comes of them back to the first stage."""
        ranks = list(range(self.world_size))
        stages = [(rank, rank + self._size) for rank in ranks[: -self._size]]
        return [*stages, *zip(ranks[-self._size :], ranks, strict=False)] if stages else []


def check_sums(asked: str) -> str:
    """What :data:`SUMS` says; raises :class:`UsageError` for anything but ``auto`` and ``nccl``."""
    if asked not in (AUTO, NCCL):
        raise UsageError(f"{SUMS}={asked} is none of {AUTO}, {NCCL}.")
    return asked
