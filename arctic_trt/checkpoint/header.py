"""Headers of safetensors files, checked against the bytes that are really there before any work starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.layout import ITEM_BYTES, TensorSpec
from arctic_trt.errors import CheckpointError

LFS_MAGIC = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
AGAIN = "Download it again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes lie: file, absolute offset, and what they are."""

    path: Path
    offset: int
    spec: TensorSpec


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Parse one file's header; raises :class:`CheckpointError` for absent, pointer, truncated and malformed files."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_MAGIC))
            _check_start(path, start, size)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _truncated(path, f"its header claims {length} bytes", size)
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.", "Download the missing file.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    return _parse(path, text, data_start=8 + length, size=size)


def _check_start(path: Path, start: bytes, size: int) -> None:
    if start.startswith(LFS_MAGIC):
        raise CheckpointError(
            f"{path} is a Git-LFS pointer of {size} bytes, not the weights.", "Run git lfs pull, or download it."
        )
    if size < 10:
        raise _truncated(path, "a safetensors file has at least 10", size)


def _truncated(path: Path, expected: str, size: int) -> CheckpointError:
    return CheckpointError(f"{path} is truncated: {expected}, but the file has {size} bytes.", AGAIN)


def _parse(path: Path, text: bytes, *, data_start: int, size: int) -> dict[str, StoredTensor]:
    try:
        table = json.loads(text, object_pairs_hook=_once)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        stored = {name: _entry(path, name, entry, data_start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header ({error}).", AGAIN) from None
    end = data_start
    for item in sorted(stored.values(), key=lambda item: (item.offset, item.spec.num_bytes)):
        if item.offset != end:
            problem = f"{item.spec.name} leaves a gap or an overlap"
            raise CheckpointError(f"{path} has a malformed safetensors header ({problem}).", AGAIN)
        end += item.spec.num_bytes
    if size < end:
        raise _truncated(path, f"its header describes {end} bytes", size)
    if size > end:
        raise CheckpointError(f"{path} has {size} bytes, but its header describes {end}.", AGAIN)
    return stored


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which every key is there once; readers differ in which of several they take."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is listed twice")
    return table


def _entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
    dtype = entry["dtype"]
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if dtype not in ITEM_BYTES:
        raise CheckpointError(
            f"{path} holds {name} as {dtype}, expected one of {', '.join(ITEM_BYTES)}.", "Convert the checkpoint to bf16."
        )
    spec = TensorSpec(name, dtype, tuple(int(n) for n in entry["shape"]))
    if begin < 0 or end - begin != spec.num_bytes:
        raise ValueError(f"{name} spans {end - begin} bytes, its shape and dtype need {spec.num_bytes}")
    return StoredTensor(path, data_start + begin, spec)


def digest_headers(paths: Iterable[Path]) -> str:
    """SHA-256 of names, sizes and headers: what identifies files without reading their data."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(repr(path.name).encode() + repr(os.fstat(file.fileno()).st_size).encode() + file.read(length))
    return digest.hexdigest()
