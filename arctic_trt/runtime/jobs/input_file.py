"""The input of a batch job: read twice, never held. The first pass counts lines and finds names that are used twice."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arctic_trt.errors import UsageError
from arctic_trt.runtime.jobs.lines import LineError, custom_id_of, decode_line

NAME_BYTES = 16
NAME = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True, slots=True)
class Shard:
    """Of ``count`` instances that share an input, the one that takes the lines whose index modulo ``count`` is ``index``."""

    index: int = 0
    count: int = 1

    def __contains__(self, line: object) -> bool:
        return isinstance(line, int) and line % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class InputMark:
    """What an input was like: its number of lines, and a digest of them that does not depend on how they end."""

    num_lines: int
    digest: str

    def as_dict(self) -> dict[str, Any]:
        return {"lines": self.num_lines, "digest": self.digest}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputScan:
    """What the first pass found.

    ``num_mine`` are the shard's lines that are not blank, ``duplicates`` gives for the index of a line the index of the first
    one with the same name, ``grown_from_known`` is whether the file begins with what was known of it.
    """

    mark: InputMark
    num_mine: int
    duplicates: dict[int, int]
    grown_from_known: bool


def parse_shard(text: str | None) -> Shard:
    """``--shard I/N``; raises :class:`UsageError`."""
    if text is None:
        return Shard()
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UsageError(f"--shard {text} is not valid, expected I/N with 0 <= I < N.", "Four instances: 0/4, 1/4, 2/4, 3/4.")
    return Shard(int(index), int(count))


def scan_input(path: Path, shard: Shard, known: InputMark | None = None) -> InputScan:
    """Read the whole file once; raises :class:`UsageError` where that is impossible."""
    whole, names = hashlib.blake2b(digest_size=NAME_BYTES), bytearray()
    named: array[int] | None = None  # indices of the lines that have names, as soon as there are lines that have none
    num_lines = num_mine = 0
    grown = known is None or known.num_lines == 0
    for index, line in enumerate(_raw_lines(path)):
        num_lines += 1
        whole.update(line)
        whole.update(b"\n")
        if line.strip():
            names += _name_digest(line, index + 1)
            num_mine += index in shard
            if named is not None:
                named.append(index)
        elif named is None:
            named = array("q", range(index))
        if known is not None and num_lines == known.num_lines:
            grown = whole.hexdigest() == known.digest
    return InputScan(
        mark=InputMark(num_lines, whole.hexdigest()),
        num_mine=num_mine,
        duplicates=_find_duplicates(names, named),
        grown_from_known=grown,
    )


def read_lines(path: Path, shard: Shard, num_lines: int) -> Iterator[tuple[int, bytes]]:
    """(index, line) of the shard's lines among the first ``num_lines``, without those that are blank."""
    for index, line in enumerate(_raw_lines(path)):
        if index == num_lines:
            return
        if index in shard and line.strip():
            yield index, line


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\r\n")
    except OSError as error:
        raise UsageError(f"--input_file {path} cannot be read: {error.strerror}.") from None


def _name_digest(line: bytes, number: int) -> bytes:
    try:
        value = decode_line(line)
    except LineError:
        value = {}
    name = custom_id_of(value, number).encode(errors="surrogatepass")
    return hashlib.blake2b(name, digest_size=NAME_BYTES).digest()


def _find_duplicates(names: bytearray, named: array[int] | None) -> dict[int, int]:
    """Indices of lines whose name an earlier line has, with the index of the first such line."""
    digests = np.frombuffer(names, NAME)
    order = np.lexsort((digests["low"], digests["high"]))  # stable: equal names stay in the order of the file
    ordered = digests[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    first: dict[int, int] = {}
    for place in same.tolist():
        before = int(order[place - 1])
        first[int(order[place])] = first.get(before, before)
    return first if named is None else {named[index]: named[before] for index, before in first.items()}
