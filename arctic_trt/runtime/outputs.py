"""Result files: whole or not there, in the shapes that TensorRT-LLM's run script gives them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from arctic_trt.errors import UsageError
from arctic_trt.runtime.completion import Completion

NO_END_ID = -1


def padded_rows(completions: Sequence[Completion], pad: int) -> npt.NDArray[np.int32]:
    """Prompt and generated ids of each sequence, int32 [batch, longest], padded on the right with ``pad``."""
    rows = [(*completion.prompt, *completion.token_ids) for completion in completions]
    out = np.full((len(rows), max(map(len, rows))), pad, np.int32)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def write_npy(path: Path, rows: npt.NDArray[np.int32], samples: int = 1) -> None:
    """``--output_npy``: int32 [batch, samples, longest]; where TensorRT-LLM has beams, or the sequences it is to return."""
    with replacing(path, "wb") as file:
        np.save(file, rows.reshape(-1, samples, rows.shape[1]))


def write_csv(path: Path, rows: npt.NDArray[np.int32]) -> None:
    """``--output_csv``: one line a sequence."""
    with replacing(path, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(rows.tolist())


class PromptLogits:
    """``--output_logits_npy``: float32 [batch, longest prompt, vocab], filled as the prompts are computed.

    The file grows under a temporary name, so that the array is never in memory; positions beyond a prompt's end stay zero.
    """

    def __init__(self, path: Path, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        self._path = path
        self._partial = partial_of(path)
        shape = (len(prompts), max(map(len, prompts)), vocab_size)
        self._logits: npt.NDArray[np.float32] = np.lib.format.open_memmap(self._partial, "w+", np.float32, shape)

    def write(self, index: int, start: int, logits_WV: Tensor) -> None:
        """Logits of prompt ``index`` at positions ``start`` and on; columns that pad the vocabulary are left out."""
        self._logits[index, start : start + len(logits_WV)] = logits_WV[:, : self._logits.shape[2]].numpy()

    def finish(self) -> None:
        self._logits.flush()  # type: ignore[attr-defined]  # a memmap
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self._path)

    def abandon(self) -> None:
        self._partial.unlink(missing_ok=True)


def check_writable(flag: str, path: Path | None) -> None:
    """Raise :class:`UsageError` before any work if ``path`` cannot become a file."""
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a directory, expected the name of a file.")
    if not os.access(path.parent, os.W_OK):
        reason = "is not writable" if path.parent.exists() else "does not exist"
        raise UsageError(f"{flag} {path}: the directory {path.parent} {reason}.", "Make it first, or choose another.")


@contextmanager
def replacing(path: Path, mode: str) -> Iterator[IO[Any]]:
    """A file that takes the name ``path`` once it is complete and on disk, and disappears if the block fails."""
    partial = partial_of(path)
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def partial_of(path: Path) -> Path:
    """The temporary name beside ``path``."""
    return path.with_name(path.name + ".partial")
