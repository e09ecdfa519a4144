"""Keys and values of the sequences that are being generated: this rank's layers and KV heads of them.

Positions are stored in e4m3 when the engine has KV scales, in float32 otherwise, and attention reads every position back from
here, the current ones included. K KV heads, L positions, H head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arctic_trt.runtime.kernels import Kernels


class KvCache:
    """One contiguous block a sequence, as long as the sequence may become."""

    def __init__(self, *, num_layers: int, kv_heads: int, head_dim: int, fp8: bool, kernels: Kernels) -> None:
        self._shape = (num_layers, 2, kv_heads, head_dim)
        self._dtype = torch.float8_e4m3fn if fp8 else torch.float32
        self._kernels = kernels
        self._blocks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def allocate(self, sequence: int, capacity: int) -> None:
        """Make room for ``capacity`` positions of a sequence that is not here yet."""
        if sequence in self._blocks:
            raise ValueError(f"sequence {sequence} is in the cache already")
        layers, pair, heads, head_dim = self._shape
        self._blocks[sequence] = torch.empty(layers, pair, heads, capacity, head_dim, dtype=self._dtype)

    def append(self, sequence: int, layer: int, start: int, keys_KTH: Tensor, values_KTH: Tensor, scale: Tensor | None) -> None:
        """Store float32 keys and values of positions ``start`` and on; ``scale`` [1] is what codes are divided by."""
        block = self._blocks[sequence][layer]
        part = slice(start, start + keys_KTH.shape[1])
        for stored, given in zip(block, (keys_KTH, values_KTH), strict=True):
            stored[:, part] = given if scale is None else self._kernels.encode_kv(given, scale)

    def view(self, sequence: int, layer: int, length: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``length`` positions, float32 [K, L, H] each."""
        keys, values = self._blocks[sequence][layer, :, :, :length]
        if scale is None:
            return keys, values
        return self._kernels.decode_kv(keys, scale), self._kernels.decode_kv(values, scale)

    def free(self, sequence: int) -> None:
        """Forget a sequence."""
        del self._blocks[sequence]

    def clear(self) -> None:
        """Forget all sequences."""
        self._blocks.clear()
