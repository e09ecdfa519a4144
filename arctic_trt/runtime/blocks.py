"""Which sequence holds which blocks of the KV cache: counted references, and full blocks that are found again by their content.

A block holds the keys and values of consecutive positions, in all layers of a rank; all ranks use the same numbers. Rank 0
alone counts. Nothing here knows tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

BLOCK_TOKENS = 32
KEY_BYTES = 16


@dataclass(frozen=True, slots=True)
class KvRoom:
    """How many blocks a rank's KV cache has, and how many positions a block."""

    num_blocks: int
    block_tokens: int = BLOCK_TOKENS

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that ``tokens`` positions take."""
        return -(-tokens // self.block_tokens)


class BlockPool:
    """Blocks 0 to ``num_blocks`` - 1: in use, cached, or unused.

    A cached block is not in use, but has content that can be shared; of those the one that was in use longest ago is given away
    first, once no unused one is left.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        self._unused = list(range(num_blocks - 1, -1, -1))  # a stack, so that memory that was never touched stays so
        self._cached: dict[int, None] = {}
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._references)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that can be taken."""
        return len(self._unused) + len(self._cached)

    def references(self, block: int) -> int:
        """How many sequences use a block."""
        return self._references[block]

    def take(self) -> int:
        """A block for new content; raises :class:`RuntimeError` when none is available."""
        if self._unused:
            block = self._unused.pop()
        elif self._cached:
            block = next(iter(self._cached))
            del self._cached[block]
            del self._block_of[self._key_of.pop(block)]
        else:
            raise RuntimeError("all blocks of the KV cache are in use")
        self._references[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The block that was published under ``key``, in use or cached."""
        return self._block_of.get(key)

    def share(self, block: int) -> None:
        """Use a block that :meth:`find` found."""
        self._cached.pop(block, None)
        self._references[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Let the content of a full block be found; of several blocks with equal content the first one is."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, in the order of its positions.

        Later positions are given away earlier: without those before them they would never be found.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._unused.append(block)


def content_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Names the content of a full block: its tokens, and by the key ``before`` it (empty for the first) all earlier ones."""
    return blake2b(before + array("i", tokens).tobytes(), digest_size=KEY_BYTES).digest()
