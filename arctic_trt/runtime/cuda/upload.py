"""Weights from a mapped file to a GPU: through two buffers from which the GPU fetches by itself.

While one is on its way to the device, the next part of the file is copied into the other: disk and bus work at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BUFFER_BYTES = 64 << 20

OnBytes = Callable[[int], None]


class Uploader:
    """Brings tensors to ``device``; ``on_bytes`` is told how many bytes have been sent, part by part."""

    def __init__(self, device: torch.device, on_bytes: OnBytes = lambda count: None, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._device, self._on_bytes = device, on_bytes
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._next = 0

    def hold(self, tensor: Tensor) -> Tensor:
        """The same tensor on the device; its copy may still be under way, ahead of all that the device is asked for later."""
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source_bytes, target_bytes = tensor.contiguous().view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        for begin in range(0, len(source_bytes), len(self._buffers[0])):
            part = slice(begin, begin + len(self._buffers[0]))
            self._send(source_bytes[part], target_bytes[part])
        return target

    def _send(self, source: Tensor, target: Tensor) -> None:
        place, self._next = self._next, 1 - self._next
        sent = self._sent[place]
        if sent is not None:
            sent.synchronize()
        buffer = self._buffers[place][: len(source)]
        buffer.copy_(source)
        target.copy_(buffer, non_blocking=True)
        if self._device.type == "cuda":
            self._sent[place] = torch.cuda.Event()
            self._sent[place].record()  # type: ignore[union-attr]
        self._on_bytes(len(source))
