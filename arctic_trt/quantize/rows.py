"""Rows of activations, one a token, in memory or in a file.

Hidden states are all that lives from layer to layer. When they outgrow the memory budget they go to a file that is read and
written by position; mapping it would count towards the resident size again.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arctic_trt.checkpoint.output_dir import named_errors, sync_directory
from arctic_trt.checkpoint.tensors import bytes_of
from arctic_trt.errors import ArcticTrtError, CheckpointError

CHUNK_ROWS = 4096
AGAIN = "Run the same command again: it starts over."


class Rows(Protocol):
    """A matrix x_TD of which only parts are handled at a time; ``token`` are ascending int64 indices."""

    def read(self, begin: int, end: int) -> Tensor:
        """Rows ``begin`` to ``end``; not to be modified."""
        ...

    def write(self, begin: int, x_TD: Tensor) -> None:
        """Replace rows from ``begin`` on."""
        ...

    def gather(self, token: Tensor) -> Tensor:
        """A copy of the given rows."""
        ...

    def add(self, token: Tensor, x_TD: Tensor) -> None:
        """Add ``x_TD`` to the given distinct rows, rounding to their dtype."""
        ...

    def clear(self) -> None:
        """Set everything to zero."""
        ...

    def close(self) -> None:
        """Give the space back."""
        ...


class MemoryRows:
    """Rows in memory."""

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.x_TD = torch.zeros(tokens, hidden, dtype=dtype)

    def read(self, begin: int, end: int) -> Tensor:
        return self.x_TD[begin:end]

    def write(self, begin: int, x_TD: Tensor) -> None:
        self.x_TD[begin : begin + len(x_TD)] = x_TD

    def gather(self, token: Tensor) -> Tensor:
        return self.x_TD[token]

    def add(self, token: Tensor, x_TD: Tensor) -> None:
        self.x_TD.index_add_(0, token, x_TD)

    def clear(self) -> None:
        self.x_TD.zero_()

    def close(self) -> None:
        self.x_TD = self.x_TD.new_empty(0, 0)


class FileRows:
    """Rows in a file that is unlinked at once: it vanishes with the process, however that ends."""

    def __init__(self, tokens: int, hidden: int, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.hidden = hidden
        self.dtype = dtype
        self._row_bytes = dtype.itemsize * hidden
        path = directory / f"rows-{os.getpid()}-{id(self):x}.partial"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        path.unlink()
        self._tokens = tokens
        self.clear()

    def read(self, begin: int, end: int) -> Tensor:
        x_TD = torch.empty(end - begin, self.hidden, dtype=self.dtype)
        self._transfer(os.preadv, x_TD, begin)
        return x_TD

    def write(self, begin: int, x_TD: Tensor) -> None:
        self._transfer(os.pwritev, x_TD.to(self.dtype).contiguous(), begin)

    def gather(self, token: Tensor) -> Tensor:
        x_TD = torch.empty(len(token), self.hidden, dtype=self.dtype)
        for begin, end, first in runs(token):
            self._transfer(os.preadv, x_TD[begin:end], first)
        return x_TD

    def add(self, token: Tensor, x_TD: Tensor) -> None:
        total_TD = self.gather(token).add_(x_TD)
        for begin, end, first in runs(token):
            self._transfer(os.pwritev, total_TD[begin:end], first)

    def clear(self) -> None:
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, self._tokens * self._row_bytes)

    def close(self) -> None:
        os.close(self._fd)

    def _transfer(self, call: object, x_TD: Tensor, first: int) -> None:
        view, done = bytes_of(x_TD), 0
        while done < len(view):
            try:
                done += call(self._fd, [view[done:]], first * self._row_bytes + done)  # type: ignore[operator]
            except OSError as error:
                raise ArcticTrtError(
                    f"Spilling hidden states to disk failed: {error.strerror}.", "Make room, or raise --memory_budget."
                ) from None


def runs(token: Tensor) -> list[tuple[int, int, int]]:
    """Split ascending indices into (begin, end, first index) of maximal runs of consecutive ones."""
    if not len(token):
        return []
    starts = [0, *((token.diff() != 1).nonzero().flatten() + 1).tolist()]
    firsts = token[starts].tolist()
    return list(zip(starts, [*starts[1:], len(token)], firsts, strict=True))


def save_rows(rows: Rows, tokens: int, path: Path) -> int:
    """Write all rows to ``path`` and return their CRC-32; :func:`sync_file` makes them durable."""
    checksum = 0
    with named_errors(path), path.open("wb") as file:
        for begin in range(0, tokens, CHUNK_ROWS):
            view = bytes_of(rows.read(begin, min(begin + CHUNK_ROWS, tokens)).contiguous())
            checksum = zlib.crc32(view, checksum)
            file.write(view)
    return checksum


def sync_file(path: Path) -> None:
    """Make ``path`` durable, content and name."""
    with named_errors(path):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sync_directory(path.parent)


def load_rows(rows: Rows, tokens: int, path: Path, expected: int) -> None:
    """Read all rows back; raises :class:`CheckpointError` when they are not those with the CRC-32 ``expected``."""
    checksum = 0
    try:
        with path.open("rb") as file:
            for begin in range(0, tokens, CHUNK_ROWS):
                x_TD = torch.zeros_like(rows.read(begin, min(begin + CHUNK_ROWS, tokens)))
                file.readinto(bytes_of(x_TD))
                checksum = zlib.crc32(bytes_of(x_TD), checksum)
                rows.write(begin, x_TD)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", AGAIN) from None
    if checksum != expected:
        raise CheckpointError(f"{path} has been damaged since it was written.", AGAIN)
