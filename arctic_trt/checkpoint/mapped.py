"""A rank file of an engine mapped into memory.

What is read of it lies in the page cache, once a host however many processes map it, and is there for the next start. Quantizing
must not do this, see :mod:`arctic_trt.checkpoint.tensors`; an engine needs all of its file all the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.checkpoint.header import StoredTensor, read_header
from arctic_trt.checkpoint.tensors import TORCH_DTYPE


class MappedFile:
    """One safetensors file, whose tensors keep the mapping alive. They must not be written to."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`CheckpointError` for an absent, truncated or malformed file."""
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = read_header(path)
        # private, since torch maps shared memory writable and would need to be allowed to write the file
        self._bytes = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def read(self, name: str) -> Tensor:
        """The tensor where it lies; a copy only if its offset is not a multiple of its item size."""
        stored = self.tensors[name]
        dtype = TORCH_DTYPE[stored.spec.dtype]
        part = self._bytes[stored.offset : stored.offset + math.prod(stored.spec.shape) * dtype.itemsize]
        aligned = part.clone() if stored.offset % dtype.itemsize else part
        return aligned.view(dtype).view(stored.spec.shape)
