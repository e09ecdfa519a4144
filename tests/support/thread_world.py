"""The ranks of an engine as threads of one process, which hand one another tensors as they are."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import Ints


class ThreadWorld:
    """What all ranks share; a rank that waits for longer than ``patience_s`` fails."""

    def __init__(self, mapping: Mapping, patience_s: float = 20.0) -> None:
        self.mapping, self.patience_s = mapping, patience_s
        self.queues: dict[tuple[int, int, str], queue.Queue[Any]] = defaultdict(queue.Queue)
        self.lock = threading.Lock()

    def queue(self, sender: int, receiver: int, kind: str) -> queue.Queue[Any]:
        with self.lock:
            return self.queues[sender, receiver, kind]


class ThreadCommunicator:
    """See :class:`arctic_trt.runtime.communicator.Communicator`."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self.rank, self.world_size = rank, world.mapping.world_size
        self._world = world
        first = rank // world.mapping.tp_size * world.mapping.tp_size
        self._group = range(first, first + world.mapping.tp_size)

    def _put(self, receiver: int, kind: str, value: Any) -> None:
        self._world.queue(self.rank, receiver, kind).put(value)

    def _take(self, sender: int, kind: str) -> Any:
        return self._world.queue(sender, self.rank, kind).get(timeout=self._world.patience_s)

    def _exchange(self, ranks: range, kind: str, value: Any) -> list[Any]:
        for receiver in ranks:
            self._put(receiver, kind, value)
        return [self._take(sender, kind) for sender in ranks]

    def all_reduce(self, x: Tensor) -> None:
        parts = self._exchange(self._group, "sum", x.clone())
        x.copy_(torch.stack(parts).sum(0))

    def all_gather(self, x_TV: Tensor) -> Tensor:
        return torch.cat(self._exchange(self._group, "gather", x_TV.clone()), 1)

    def send(self, x: Tensor, rank: int) -> None:
        assert x.dtype == torch.float32
        self._put(rank, "send", x.clone())

    def receive(self, shape: tuple[int, ...], rank: int) -> Tensor:
        x: Tensor = self._take(rank, "send")
        assert x.shape == shape
        return x

    def broadcast(self, values: Ints | None) -> Ints:
        if values is not None:
            for receiver in range(1, self.world_size):
                self._put(receiver, "broadcast", values.copy())
            return values
        received: Ints = self._take(0, "broadcast")
        return received

    def gather_all(self, value: Any) -> list[Any]:
        return self._exchange(range(self.world_size), "all", value)
