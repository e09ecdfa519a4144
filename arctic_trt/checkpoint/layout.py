"""Where every tensor of a safetensors file lies, decided before the first byte is written.

The format (https://huggingface.co/docs/safetensors) is an 8-byte little-endian header length, a JSON header that may be
padded with spaces, and the tensors' bytes. The header is padded to a page here, so that data begins page-aligned.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PAGE_BYTES = 4096
ITEM_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (safetensors spelling) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The header bytes of one file, and each tensor's spec and absolute offset in it."""

    header: bytes
    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    total_bytes: int


def plan_layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> FileLayout:
    """Place ``specs`` one after another in the given order; raises ``ValueError`` on a repeated name."""
    by_name: dict[str, TensorSpec] = {}
    relative: dict[str, int] = {}
    end = 0
    for spec in specs:
        if spec.name in by_name:
            raise ValueError(f"{spec.name} is listed twice")
        by_name[spec.name], relative[spec.name] = spec, end
        end += spec.num_bytes
    header = _encode_header(by_name, relative, metadata or {})
    offsets = {name: len(header) + begin for name, begin in relative.items()}
    return FileLayout(header, by_name, offsets, len(header) + end)


def _encode_header(specs: Mapping[str, TensorSpec], relative: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, spec in specs.items():
        begin = relative[name]
        table[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, begin + spec.num_bytes]}
    text = json.dumps(table, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)
