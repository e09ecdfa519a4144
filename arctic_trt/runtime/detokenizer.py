"""Token ids to text while they arrive.

The pieces add up to exactly what decoding all ids at once gives. That forbids decoding tokens one by one (a leading space is
only known from what comes before) and showing bytes early: characters outside the vocabulary arrive as runs of single bytes,
and a run is decoded as a whole, so a piece ends only where no run is open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from arctic_trt.model.tokenizer import Tokenizer

OnPiece = Callable[[int, str], None]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Detokenizer:
    """One sequence's text. Only after a token in ``settled`` something is certain: see :func:`settled_ids`."""

    def __init__(self, decode: Callable[[list[int]], str], settled: Set[int]) -> None:
        self._decode = decode
        self._settled = settled
        self._context: list[int] = []  # tokens whose text is out, kept because it decides about the next one's leading space
        self._open: list[int] = []

    def push(self, token: int) -> str:
        """The text that has become certain with ``token``; often empty within a character."""
        self._open.append(token)
        return self._take(final=False) if token in self._settled else ""

    @property
    def open(self) -> bool:
        """Some tokens' text is not known yet."""
        return bool(self._open)

    def flush(self) -> str:
        """What is still held back, at the end of the sequence."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        known = self._decode(self._context)
        text = self._decode(self._context + self._open)[len(known) :]
        if not text or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._context, self._open = self._open, []
        return text


class StopWords:
    """Watches pieces of text for words that end a sequence; the word itself and what follows are not text any more."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text that is certainly before any stop word, whether one was found)."""
        text = self._held + piece
        ends = [at for at in (text.find(word) for word in self._words) if at >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    @property
    def holding(self) -> bool:
        """Some text may be the beginning of a stop word."""
        return bool(self._held)

    def flush(self) -> str:
        """Held-back text that turned out not to begin a stop word."""
        text, self._held = self._held, ""
        return text

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop word begins with."""
        for length in range(min(len(text), max((len(word) - 1 for word in self._words), default=0)), 0, -1):
            if any(word.startswith(text[-length:]) for word in self._words):
                return length
        return 0


def settled_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a run of bytes: neither bytes, nor what leaves no trace in the text, control tokens and unknown ids."""
    words = {index for token, index in tokenizer.hf.get_vocab().items() if not BYTE_TOKEN.fullmatch(token)}
    return frozenset(words - set(tokenizer.hf.all_special_ids))


@dataclass(slots=True)
class Writer:
    """One sequence's way from tokens to text; without a detokenizer there is no text."""

    index: int
    on_piece: OnPiece
    detokenizer: Detokenizer | None
    stop_words: StopWords
    pieces: list[str] = field(default_factory=list)
    num_settled: int = 0

    def push(self, token: int) -> bool:
        """Add a token's text; returns whether a stop word has appeared."""
        return self.detokenizer is not None and self._add(self.detokenizer.push(token))

    def flush(self) -> bool:
        """Add what was held back; returns whether a stop word has appeared in it."""
        if self.detokenizer is not None and self._add(self.detokenizer.flush()):
            return True
        self._emit(self.stop_words.flush())
        return False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def settled(self) -> bool:
        """The text of all tokens so far is out."""
        return self.detokenizer is not None and not self.detokenizer.open and not self.stop_words.holding

    def _add(self, piece: str) -> bool:
        text, stopped = self.stop_words.push(piece)
        self._emit(text)
        return stopped

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.on_piece(self.index, text)
