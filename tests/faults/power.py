"""A disk that loses what was not synced when the power fails.

While it watches a directory, it remembers what each ``fsync`` and ``fdatasync`` has made durable: of a file its content, of a
directory its names. :meth:`Disk.fail` tells what could be found there after a power loss at this moment.
"""

from __future__ import annotations

import os
import random
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BLOCK = 512
SYNC_S = 0.01
"""How long a sync takes: whoever does not wait for it goes on without it."""
WATCHED = ("pwrite", "fdatasync", "fsync", "replace", "unlink")
Image = dict[str, bytes | None]
Names = dict[str, int]


@dataclass(frozen=True)
class Live:
    """What the running system sees: the names in each directory and the content of each file, by inode."""

    names: dict[int, Names]
    contents: dict[int, bytes]


class Disk:
    """Watches ``root`` from construction; ``on_change(number, call)`` runs before every change, and nothing changes meanwhile."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, on_change: Callable[[int, str], None]) -> None:
        self._root = root
        self._names: dict[int, Names] = {}
        self._contents: dict[int, bytes] = {}
        self._kept_open: list[int] = []  # so that no inode's number is given to another file
        self._lock = threading.RLock()
        self._count = 0
        self._on_change = on_change
        for name in WATCHED:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def close(self) -> None:
        for descriptor in self._kept_open:
            os.close(descriptor)

    def fail(self, draw: random.Random | None) -> Image:
        """The directory after a power loss now: only what was synced, or any part of the rest, too, as ``draw`` decides."""
        live = _look(self._root)
        image: Image = {}
        self._collect(image, "", self._root.stat().st_ino, live, draw)
        return image

    def _collect(self, image: Image, prefix: str, directory: int, live: Live, draw: random.Random | None) -> None:
        durable = self._names.get(directory, {})
        names = draw.choice([durable, live.names.get(directory, durable)]) if draw else durable
        for name, inode in names.items():
            if inode in live.names or inode in self._names:
                image[prefix + name] = None
                self._collect(image, f"{prefix}{name}/", inode, live, draw)
            else:
                synced = self._contents.get(inode, b"")
                image[prefix + name] = _mix(synced, live.contents.get(inode, synced), draw) if draw else synced

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "fdatasync":
                time.sleep(SYNC_S)
            with self._lock:
                self._on_change(self._count, name)
                self._count += 1
                result = original(*args, **kwargs)
                if name in ("fsync", "fdatasync"):
                    self._remember(args[0])
                return result

        return call

    def _remember(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        self._kept_open.append(os.dup(descriptor))
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = _names(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        else:
            self._contents[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()


def write_image(root: Path, image: Image) -> None:
    """Make ``root`` as ``image`` says."""
    root.mkdir()
    for name, content in image.items():
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)


def _look(root: Path) -> Live:
    names, contents = {}, {}
    for path in (root, *root.rglob("*")):
        inode = path.stat().st_ino
        if path.is_dir():
            names[inode] = _names(path)
        else:
            contents[inode] = path.read_bytes()
    return Live(names, contents)


def _names(directory: Path) -> Names:
    return {entry.name: entry.inode() for entry in sorted(os.scandir(directory), key=lambda entry: entry.name)}


def _mix(synced: bytes, live: bytes, draw: random.Random) -> bytes:
    """A file of which some blocks had been written back before the power failed."""
    if synced == live:
        return live
    size = draw.choice([len(synced), len(live)])
    old, new = synced.ljust(size, b"\0"), live.ljust(size, b"\0")
    blocks = ((old if draw.random() < 0.5 else new)[begin : begin + BLOCK] for begin in range(0, size, BLOCK))
    return b"".join(blocks)[:size]
