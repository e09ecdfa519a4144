"""CRC-32 of every tensor of a checkpoint or an engine: what a later look holds the bytes on disk to.

Tensors are written in equal parts, in any order, by several threads and processes. The CRCs of the parts make that of the whole,
so that whoever checks a tensor needs to know nothing of how it was written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from arctic_trt.errors import CheckpointError

DIGESTS = "report/digests.json"
Crc = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
Parts = dict[str, dict[int, int]]
"""CRC-32 of the parts of tensors that have been written, by tensor and index."""


class Digests(BaseModel):
    """What :data:`DIGESTS` holds: the CRC-32 of side files by name, and of each rank file's tensors by name; eight hex digits."""

    model_config = ConfigDict(frozen=True, strict=True)

    files: dict[str, Crc]
    tensors: dict[str, dict[str, Crc]]


def read_digests(directory: Path) -> Digests | None:
    """What was recorded when ``directory`` was written, None if nothing was; :class:`CheckpointError` for a broken record."""
    path = directory / DIGESTS
    try:
        return Digests.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} cannot be read: {reason}.", "Copy the directory again, or remove the file.") from None


def crc_text(crc: int) -> str:
    """A CRC-32 as :data:`DIGESTS` has it."""
    return f"{crc:08x}"


def file_crc(path: Path) -> str:
    """The CRC-32 of a small file."""
    return crc_text(zlib.crc32(path.read_bytes()))


def join_crcs(crcs: Iterable[int], part_bytes: int) -> int:
    """The CRC-32 of parts of ``part_bytes`` each, one after another, from the CRC-32 of each."""
    whole, skip = 0, _skip(part_bytes)
    for crc in crcs:
        whole = _apply(skip, whole) ^ crc
    return whole


def tensor_crcs(parts: Iterable[Parts], num_bytes: Mapping[str, int]) -> dict[str, str]:
    """The CRC-32 of every tensor of one file of which ``parts``, each process's, have been written; all parts of a tensor."""
    merged: Parts = {}
    for written in parts:
        for name, by_index in written.items():
            merged.setdefault(name, {}).update(by_index)
    return {
        name: crc_text(join_crcs((by_index[index] for index in range(len(by_index))), num_bytes[name] // len(by_index)))
        for name, by_index in merged.items()
    }


@cache
def _skip(num_bytes: int) -> tuple[int, ...]:
    """What ``num_bytes`` bytes that follow do to a CRC: a matrix over bits, the image of each of the 32."""
    if num_bytes == 1:
        return tuple(zlib.crc32(b"\0", 1 << bit) ^ zlib.crc32(b"\0") for bit in range(32))
    half = _skip(num_bytes // 2)
    even = tuple(_apply(half, column) for column in half)
    return tuple(_apply(_skip(1), column) for column in even) if num_bytes % 2 else even


def _apply(matrix: tuple[int, ...], crc: int) -> int:
    image = 0
    while crc:
        bit = crc.bit_length() - 1
        image ^= matrix[bit]
        crc ^= 1 << bit
    return image
