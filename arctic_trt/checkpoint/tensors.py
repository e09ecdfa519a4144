"""Positioned reads and writes of tensors: one system call's worth of bytes at a time, no memory mapping.

Mapped files would count towards the resident size of the process, page by page, and a checkpoint is larger than any memory;
reads into buffers of our own keep the resident size at what is really in use.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from arctic_trt.checkpoint.digests import Parts
from arctic_trt.checkpoint.header import StoredTensor, read_header
from arctic_trt.checkpoint.layout import FileLayout, TensorSpec
from arctic_trt.errors import ArcticTrtError, CheckpointError

TORCH_DTYPE = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
CHUNK_BYTES = 16 << 20
PARTIAL = ".partial"
_libc = ctypes.CDLL(None, use_errno=True)


def flat_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as uint8 [n]; a copy only where it is not contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs lack Buffer


class TensorFile:
    """One safetensors file open for positioned reads; its header is checked when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: Mapping[str, StoredTensor] = read_header(path)
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, name: str, memory: Tensor | None = None) -> Tensor:
        """The whole tensor, in ``memory`` (uint8, large enough) if given, else in memory of its own.

        Raises :class:`CheckpointError` if the file has shrunk meanwhile.
        """
        return self._read(self.tensors[name], 0, self.tensors[name].spec.shape, memory)

    def read_rows(self, name: str, begin: int, end: int | None) -> Tensor:
        """Entries ``begin`` to ``end`` (None: all that follow) of the first axis, without reading the others."""
        stored = self.tensors[name]
        count, *rest = stored.spec.shape
        rows = range(count)[begin:end]
        return self._read(stored, begin * (stored.spec.num_bytes // count), (len(rows), *rest), None)

    def _read(self, stored: StoredTensor, offset: int, shape: tuple[int, ...], memory: Tensor | None) -> Tensor:
        spec = TensorSpec(stored.spec.name, stored.spec.dtype, shape)
        if memory is None:
            memory = torch.empty(spec.num_bytes, dtype=torch.uint8)
        tensor = memory[: spec.num_bytes].view(TORCH_DTYPE[spec.dtype]).view(shape)
        view, done = bytes_of(tensor), 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + CHUNK_BYTES]], stored.offset + offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path} ended inside {spec.name} while it was read.", "Is another process writing to it?"
                )
            done += count
        return tensor

    def expect(self, name: str) -> None:
        """Tell the kernel that ``name`` will be read soon, so that the disk starts now."""
        stored = self.tensors[name]
        os.posix_fadvise(self._fd, stored.offset, stored.spec.num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._fd)


class TensorFileWriter:
    """A safetensors file of known layout under a temporary name, written in any order, visible only once complete.

    With ``resume`` an existing partial file is continued; :meth:`assume` then says which tensors it already holds. Writes may
    come from several threads, and from several processes that share the file, as long as no two write the same part.
    """

    def __init__(self, path: Path, layout: FileLayout, *, resume: bool = False) -> None:
        self.path = path
        self.layout = layout
        self.bytes_written = 0
        self.written: Counter[str] = Counter()
        self._crcs: Parts = {}
        self._lock = threading.Lock()
        self._partial = path.with_name(path.name + PARTIAL)
        self._fd = -1
        with self._named_errors():
            if resume and path.exists() and not self._partial.exists():
                os.replace(path, self._partial)  # an earlier run had come as far as naming its files
            self._fd = os.open(self._partial, os.O_RDWR | (0 if resume else os.O_CREAT | os.O_TRUNC), 0o644)
        if not resume:
            self._begin()

    def _begin(self) -> None:
        try:
            with self._named_errors():
                reserve(self._fd, self.layout.total_bytes)
            self._pwrite(memoryview(self.layout.header), 0)
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
        crc = zlib.crc32(view)
        with self._lock:
            self.written[name] += len(view)
            self._crcs.setdefault(name, {})[index] = crc

    def assume(self, name: str) -> None:
        """Count ``name`` as complete: an earlier run or another process wrote it."""
        self.written[name] = self.layout.specs[name].num_bytes

    def take_crcs(self) -> Parts:
        """CRC-32 of every part written since this was last asked."""
        with self._lock:
            crcs, self._crcs = self._crcs, {}
        return crcs

    def sync(self) -> None:
        """Make what has been written so far durable."""
        with self._named_errors():
            os.fdatasync(self._fd)

    def finish(self, written: Iterable[Mapping[str, int]] = ()) -> None:
        """Make the bytes durable and give the file its name; raises ``RuntimeError`` if any tensor is incomplete.

        Where several processes wrote parts, ``written`` are all their counts; without it this one's count.
        """
        counts = list(written) or [self.written]
        for name, spec in self.layout.specs.items():
            total = sum(part.get(name, 0) for part in counts)
            if total < spec.num_bytes:
                raise RuntimeError(f"{self.path}: {name} has {total} of {spec.num_bytes} bytes")
        with self._named_errors():
            os.fsync(self._fd)
            os.replace(self._partial, self.path)
        self.close()

    def close(self) -> None:
        """Leave the partial file as it is, to be continued or removed."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)

    def abandon(self) -> None:
        """Give up, also after :meth:`finish` has failed."""
        self.close()
        self._partial.unlink(missing_ok=True)

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        with self._named_errors():
            while done < len(view):
                count = os.pwrite(self._fd, view[done : done + CHUNK_BYTES], offset + done)
                done += count
                with self._lock:
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


def reserve(fd: int, num_bytes: int) -> None:
    """Give a new file its size and, where the file system can, its blocks: a disk too small then shows before any work."""
    if _libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(num_bytes)) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    os.ftruncate(fd, num_bytes)


def describe(shape: tuple[int, ...]) -> str:
    """A shape as people write it, ``[128, 7168]``."""
    return f"[{', '.join(map(str, shape))}]"
