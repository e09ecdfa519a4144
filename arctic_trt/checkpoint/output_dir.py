"""An output directory that is either complete, or marked as unfinished work of ours, or not there.

A marker file is written before anything else and removed last, after everything has been made durable. What a directory may be
cleared of is decided by name, so that nobody's other files are ever deleted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model import tokenizer

MARKER = ".arctic-trt-unfinished"
OWN_NAMES = re.compile(r"rank\d+\.safetensors|config\.json|report/.*|" + "|".join(re.escape(name) for name in tokenizer.FILES))
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
        self._created = False

    def __enter__(self) -> OutputDir:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, expected a directory.", "Choose another --output_dir.")
        self._created = not self.path.exists()
        check_occupied(self.path, overwrite=self.overwrite)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / MARKER, {"kind": self.kind})
        except OSError as error:
            raise RefusedError(f"{self.path} cannot be written: {error.strerror}.", "Choose another --output_dir.") from None
        clear(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            clear(self.path)
        else:
            sync_directory(self.path)
        (self.path / MARKER).unlink()
        if error is not None and self._created:
            self.path.rmdir()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``name``, a path relative to the directory, atomically."""
        (self.path / name).parent.mkdir(exist_ok=True)
        write_json(self.path / name, value)

    def copy(self, source: Path, name: str) -> None:
        """Copy a small file into the directory, atomically."""
        write_bytes(self.path / name, source.read_bytes())


def entries(path: Path) -> list[str]:
    """Relative names of all files below ``path``, in order."""
    return sorted(str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir())


def is_own(name: str) -> bool:
    """Whether a relative file name is one that checkpoints and engines consist of."""
    return name == MARKER or OWN_NAMES.fullmatch(name.removesuffix(PARTIAL)) is not None


def check_occupied(path: Path, *, overwrite: bool) -> None:
    """Refuse a directory that holds a finished work without ``overwrite``, or anything foreign in any case."""
    present = entries(path) if path.exists() else []
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


def clear(path: Path) -> None:
    """Delete what :func:`is_own` names, except the marker."""
    for name in entries(path):
        if name != MARKER and is_own(name):
            (path / name).unlink()
    shutil.rmtree(path / "report", ignore_errors=True)


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
