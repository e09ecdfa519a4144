"""Positioned reads and writes of tensors: one system call's worth of bytes at a time, no memory mapping.

Mapped files would count towards the resident size of the process, page by page, and a checkpoint is larger than any memory;
reads into buffers of our own keep the resident size at what is really in use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.checkpoint.header import StoredTensor, read_header
from arctic_trt.checkpoint.layout import FileLayout
from arctic_trt.errors import ArcticTrtError, CheckpointError

TORCH_DTYPE = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
CHUNK_BYTES = 16 << 20


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer


class TensorFile:
    """One safetensors file open for positioned reads; its header is checked when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = read_header(path)
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, name: str) -> Tensor:
        """The whole tensor in memory of its own; raises :class:`CheckpointError` if the file has shrunk meanwhile."""
        return self.read_rows(name, 0, None)

    def read_rows(self, name: str, begin: int, end: int | None) -> Tensor:
        """Entries ``begin`` to ``end`` (None: all that follow) of the first axis, without reading the others."""
        stored = self.tensors[name]
        rows = range(stored.spec.shape[0])[begin:end]
        tensor = torch.empty((len(rows), *stored.spec.shape[1:]), dtype=TORCH_DTYPE[stored.spec.dtype])
        view, done = bytes_of(tensor), 0
        offset = stored.offset + begin * (stored.spec.num_bytes // stored.spec.shape[0])
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + CHUNK_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} ended inside {name} while it was read.", "Is another process writing to it?")
            done += count
        return tensor

    def close(self) -> None:
        os.close(self._fd)


class TensorFileWriter:
    """A safetensors file of known layout under a temporary name, written in any order, visible only once complete."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self.path = path
        self.layout = layout
        self.bytes_written = 0
        self._left = {name: spec.num_bytes for name, spec in layout.specs.items()}
        self._partial = path.with_name(path.name + ".partial")
        with self._named_errors():
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with self._named_errors():
                os.ftruncate(self._fd, layout.total_bytes)
            self._pwrite(memoryview(layout.header), 0)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, part: Tensor, index: int = 0) -> None:
        """Write ``part`` as the ``index``-th of the equal parts of which the tensor consists along its first axis."""
        spec = self.layout.specs[name]
        view = bytes_of(part.contiguous())
        if TORCH_DTYPE[spec.dtype] != part.dtype or len(view) * (index + 1) > spec.num_bytes:
            raise ValueError(f"{name}: part {index} is {part.dtype} {tuple(part.shape)}, the file expects {spec}")
        self._pwrite(view, self.layout.offsets[name] + index * len(view))
        self._left[name] -= len(view)

    def finish(self) -> None:
        """Make the bytes durable and give the file its name; raises ``RuntimeError`` if any tensor is incomplete."""
        unwritten = [name for name, left in self._left.items() if left]
        if unwritten:
            raise RuntimeError(f"{self.path}: {len(unwritten)} tensors are not complete, e.g. {unwritten[0]}")
        with self._named_errors():
            os.fsync(self._fd)
            os.replace(self._partial, self.path)
        self._close()

    def abandon(self) -> None:
        """Give up, also after :meth:`finish` has failed."""
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        with self._named_errors():
            while done < len(view):
                count = os.pwrite(self._fd, view[done : done + CHUNK_BYTES], offset + done)
                done += count
                self.bytes_written += count

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Turn what the disk refuses into one sentence that names the file."""
        try:
            yield
        except OSError as error:
            raise ArcticTrtError(
                f"{self.path} cannot be written: {error.strerror} after {self.bytes_written} of {self.layout.total_bytes} bytes.",
                "Make room and run the same command again.",
            ) from None


def describe(shape: tuple[int, ...]) -> str:
    """A shape as people write it, ``[128, 7168]``."""
    return f"[{', '.join(map(str, shape))}]"
