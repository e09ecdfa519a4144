"""What ranks say to each other on GPUs: tensors go from device to device, everything else over MPI as on the CPU.

NCCL's sums are the same bits on every rank of a group, which is all that routing needs.
"""

from __future__ import annotations

import socket
from typing import Any

import torch
from torch import Tensor

from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import Communicator, Ints


class DeviceCommunicator:
    """A rank of ``mapping``'s world: control by ``control``, tensors by torch.distributed with ``backend``.

    See :class:`arctic_trt.runtime.communicator.Communicator`; every rank makes one at the same time. No call waits for the
    device, so that all may be recorded in a CUDA graph.
    """

    def __init__(self, control: Communicator, mapping: Mapping, device: torch.device, backend: str = "nccl") -> None:
        from torch import distributed

        self.rank, self.world_size = control.rank, control.world_size
        self._control, self._device, self._size = control, device, mapping.tp_size
        hosts = control.gather_all(socket.gethostname())
        where = control.gather_all(_free_address(alone=len(set(hosts)) == 1) if control.rank == 0 else None)[0]
        distributed.init_process_group(
            backend,
            init_method=f"tcp://{where}",
            rank=self.rank,
            world_size=self.world_size,
            device_id=device if device.type == "cuda" else None,
        )
        stages = [range(first, first + mapping.tp_size) for first in range(0, self.world_size, mapping.tp_size)]
        groups = [distributed.new_group(list(stage)) for stage in stages]  # every rank takes part in making each
        self._group: Any = groups[self.rank // mapping.tp_size]
        self._distributed = distributed

    def all_reduce(self, x: Tensor) -> None:
        if self._size > 1:
            self._distributed.all_reduce(x, group=self._group)

    def all_gather(self, x_TV: Tensor) -> Tensor:
        if self._size == 1:
            return x_TV
        parts = torch.empty(self._size * len(x_TV), x_TV.shape[1], dtype=x_TV.dtype, device=self._device)
        self._distributed.all_gather_into_tensor(parts, x_TV.contiguous(), group=self._group)
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


def _free_address(*, alone: bool) -> str:
    """A port on which the other ranks can find rank 0; where this host is ``alone``, its name need not mean anything."""
    host = "127.0.0.1" if alone else socket.gethostbyname(socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"
