"""Keys and values of the sequences that are being generated: this rank's layers and KV heads of them, in blocks.

Positions are stored in e4m3 when the engine has KV scales, in float32 otherwise, and attention reads every position back from
here, the current ones included. B blocks, K KV heads, P positions a block, H head dim.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from arctic_trt.runtime.blocks import BLOCK_TOKENS, KvRoom
from arctic_trt.runtime.step import Step

CPU = torch.device("cpu")


class KvCache:
    """``pages`` has a tensor [B, 2, K, P, H] a layer, ``tables`` the blocks of each sequence, as rank 0 assigned them."""

    def __init__(
        self, *, num_layers: int, kv_heads: int, head_dim: int, fp8: bool, device: torch.device = CPU, spare_blocks: int = 0
    ) -> None:
        """``spare_blocks`` more than the room are for what is not kept."""
        self._num_layers, self._kv_heads, self._head_dim = num_layers, kv_heads, head_dim
        self._dtype = torch.float8_e4m3fn if fp8 else torch.float32
        self._device, self._spare_blocks = device, spare_blocks
        self.room = KvRoom(0)
        self.pages: list[Tensor] = []
        self.tables: dict[int, array[int]] = {}  # numpy copies an array three times as fast as a list

    @property
    def block_bytes(self) -> int:
        """Bytes of :data:`BLOCK_TOKENS` positions."""
        return self._num_layers * 2 * self._kv_heads * BLOCK_TOKENS * self._head_dim * self._dtype.itemsize

    def reserve(self, room: KvRoom) -> None:
        """Make room. The system provides memory for a block when the block is first written."""
        shape = (room.num_blocks + self._spare_blocks, 2, self._kv_heads, room.block_tokens, self._head_dim)
        self.pages = [torch.empty(shape, dtype=self._dtype, device=self._device) for _ in range(self._num_layers)]
        self.room = room

    def assign(self, step: Step) -> None:
        """Forget the sequences that ``step`` frees, and note the blocks that it assigns."""
        for sequence in step.freed:
            del self.tables[sequence]
        for chunk in step.chunks:
            self.tables.setdefault(chunk.sequence, array("i")).extend(chunk.blocks)

    def clear(self) -> None:
        """Forget all sequences."""
        self.tables.clear()
