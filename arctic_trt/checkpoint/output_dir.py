"""An output directory that is either complete, or marked as unfinished work of ours, or not there.

A marker file is written before anything else and removed last, after everything has been made durable. What a directory may be
cleared of is decided by name, so that nobody's other files are ever deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from arctic_trt.errors import ArcticTrtError, RefusedError, UsageError
from arctic_trt.model import tokenizer

MARKER = ".arctic-trt-unfinished"
OWN_NAMES = re.compile(
    r"rank\d+\.safetensors|config\.json|report/[a-z_]+\.json|" + "|".join(re.escape(name) for name in tokenizer.FILES)
)
PARTIAL = ".partial"


class OutputDir:
    """Context manager around the writing of one checkpoint or engine.

    Entering claims the directory; leaving normally completes it; leaving with an exception removes what was written.
    Raises :class:`RefusedError` when the directory holds anything that this program must not touch.
    """

    def __init__(self, path: Path, *, kind: str, overwrite: bool = False) -> None:
        self.path = path
        self.kind = kind
        self.overwrite = overwrite
        self._created: list[Path] = []

    def __enter__(self) -> OutputDir:
        check_occupied(self.path, overwrite=self.overwrite)
        self._created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / MARKER, {"kind": self.kind})
        except OSError as error:
            self._remove_created()
            raise RefusedError(f"{self.path} cannot be written: {error.strerror}.", "Choose another --output_dir.") from None
        clear(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            clear(self.path)
        else:
            sync_directory(self.path)
        (self.path / MARKER).unlink()
        if error is not None:
            self._remove_created()

    def _remove_created(self) -> None:
        with suppress(OSError):
            (self.path / (MARKER + PARTIAL)).unlink(missing_ok=True)
            for path in self._created:
                path.rmdir()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``name``, a path relative to the directory, atomically."""
        with self._named_errors(name):
            (self.path / name).parent.mkdir(exist_ok=True)
            write_json(self.path / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file into the directory, atomically."""
        data = source.read_bytes()
        with self._named_errors(name):
            write_bytes(self.path / name, data)

    @contextmanager
    def _named_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArcticTrtError(
                f"{self.path / name} cannot be written: {error.strerror}.", "Make room and run the same command again."
            ) from None


def entries(path: Path) -> list[str]:
    """Relative names of all files below ``path``, in order."""
    return sorted(str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir())


def is_own(name: str) -> bool:
    """Whether a relative file name is one that checkpoints and engines consist of."""
    stem = name.removesuffix(PARTIAL)
    return stem == MARKER or OWN_NAMES.fullmatch(stem) is not None


def check_occupied(path: Path, *, overwrite: bool) -> None:
    """Refuse a file, a directory that holds finished work without ``overwrite``, or anything foreign in any case."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a directory.", "Choose another --output_dir.")
    present = [name for name in entries(path) if name != MARKER + PARTIAL] if path.exists() else []
    if MARKER in present:
        overwrite = True
    foreign = [name for name in present if not is_own(name)]
    if foreign:
        raise RefusedError(
            f"{path} already holds {foreign[0]}, which is not part of a checkpoint or an engine.",
            "Choose an empty or new --output_dir; --overwrite never deletes such files.",
        )
    if present and not overwrite:
        raise RefusedError(f"{path} is not empty: it holds {present[0]}.", "Choose another --output_dir, or pass --overwrite.")


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse before starting when the disk cannot hold the output; what :func:`clear` would delete counts as free."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    own_bytes = sum((path / name).lstat().st_blocks * 512 for name in entries(path) if is_own(name)) if existing == path else 0
    free = shutil.disk_usage(existing).free + own_bytes
    if free < needed_bytes:
        raise RefusedError(
            f"{path} needs {needed_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.",
            "Free some space or choose another --output_dir.",
        )


def clear(path: Path) -> None:
    """Delete what :func:`is_own` names, except the marker."""
    for name in entries(path):
        if name != MARKER and is_own(name):
            (path / name).unlink()
    with suppress(OSError):
        (path / "report").rmdir()  # unless somebody else's files are in it


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name, make it durable, rename."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole or not at all, also after a power loss."""
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and removals in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
