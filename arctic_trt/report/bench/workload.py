"""Prompts of a benchmark: random ones that share no beginning, or those of a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.inputs import Prompt, tokenize

WORD_MARKS = ("▁", "Ġ")
"""What stands for the space before a word in a vocabulary: SentencePiece's sign, and that of byte-level BPE."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BenchPrompt:
    """A prompt as token ids and, for servers that take nothing else, as the text that a tokenizer makes these ids of."""

    token_ids: tuple[int, ...]
    text: str | None = None


class Workload(Protocol):
    """Where prompts come from."""

    def take(self, count: int, length: int | None) -> list[BenchPrompt]:
        """The next ``count`` prompts, of ``length`` tokens."""


class RandomPrompts:
    """Token ids drawn from ``pool``, the same for the same seed.

    No two prompts that are ever taken begin with the same two tokens (up to the square of the pool's size), so that an engine
    that keeps the cache of equal beginnings has nothing to keep.
    """

    def __init__(self, pool: Sequence[int], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._pool = self._rng.permutation(np.asarray(pool))
        self._taken = 0

    def take(self, count: int, length: int | None) -> list[BenchPrompt]:
        """Prompts of ``length`` tokens each."""
        if length is None:
            raise UsageError("Random prompts need a length.", "Give -l.")
        return [self._next(length) for _ in range(count)]

    def _next(self, length: int) -> BenchPrompt:
        turn, first = divmod(self._taken, len(self._pool))
        self._taken += 1
        places = [first, (first + turn) % len(self._pool), *self._rng.integers(len(self._pool), size=max(0, length - 2))]
        return BenchPrompt(tuple(self._pool[places[:length]].tolist()))


class FilePrompts:
    """The prompts of ``--input_file`` in their order, from the beginning again when they run out; cut at ``length`` tokens."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer | None) -> None:
        self._prompts = [BenchPrompt(tuple(tokenize(prompt, tokenizer, chat=False))) for prompt in prompts]
        self._next = 0

    def take(self, count: int, length: int | None) -> list[BenchPrompt]:
        """The next prompts; says so when they repeat."""
        if self._next <= len(self._prompts) < self._next + count:
            logger.warning(
                "--input_file has %d prompts and more are needed: they repeat, and an engine that reuses equal beginnings gains "
                "from that.",
                len(self._prompts),
            )
        places = range(self._next, self._next + count)
        self._next += count
        return [BenchPrompt(self._prompts[place % len(self._prompts)].token_ids[:length]) for place in places]


class SpelledPrompts:
    """The prompts of ``inner`` as text, with the ids that a server's tokenizer makes of that text."""

    def __init__(self, inner: Workload, tokenizer: Tokenizer) -> None:
        self._inner = inner
        self._tokenizer = tokenizer

    def take(self, count: int, length: int | None) -> list[BenchPrompt]:
        """Prompts of about ``length`` tokens, with the token that begins every text."""
        begins = len(self._tokenizer.encode("")) if length is not None else 0
        inner = self._inner.take(count, None if length is None else max(1, length - begins))
        texts = [self._tokenizer.decode(list(prompt.token_ids)) for prompt in inner]
        return [BenchPrompt(tuple(self._tokenizer.encode(text)), text) for text in texts]


def words_of(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that are a whole word with a space before it, so that text made of them has as many tokens.

    All ids but those of control tokens where the vocabulary marks no words.
    """
    vocabulary: dict[str, int] = tokenizer.hf.get_vocab()
    words = {piece[1:]: token for piece, token in vocabulary.items() if piece.startswith(WORD_MARKS) and piece[1:].isalpha()}
    encoded = tokenizer.hf([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
    whole = sorted(token for token, ids in zip(words.values(), encoded, strict=True) if ids[-1] == token)
    special = set(tokenizer.hf.all_special_ids)
    return whole or sorted(token for token in vocabulary.values() if token not in special)
