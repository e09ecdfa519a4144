"""Text for TensorRT-LLM's C++ backend: what goes into its tensors, and what its tokens say.

The same rules as for a run on such an engine: the text decides about stop words; the engine gets them as tokens too, to spare it
some, and knows one end token, so that the others become stop words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.detokenizer import Detokenizer, StopWords, Writer, settled_ids
from arctic_trt.runtime.requests import find_end_ids, word_ids
from arctic_trt.triton.legacy import LOG_PROBS, SAMPLING

NO_END = -1
PER_SEQUENCE = ("sequence_length", *(str(output["name"]) for output in LOG_PROBS))

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Tensors = Mapping[str, Array]
"""By name, each with its batch dimension of 1."""


class LegacyText:
    """One tokenizer's way from a client's tensors to the engine's and back."""

    def __init__(self, tokenizer_dir: Path) -> None:
        self.tokenizer = Tokenizer(tokenizer_dir)
        self._settled = settled_ids(self.tokenizer)
        self._end_ids = find_end_ids(None, self.tokenizer, tokenizer_dir)

    def ask(
        self,
        text: str,
        max_tokens: int,
        stop_words: Sequence[str],
        bad_words: Sequence[str],
        end_id: int | None,
        pad_id: int | None,
    ) -> Arrays:
        """The engine's tensors for ``text``, int32, by its names; raises :class:`UsageError` for ``max_tokens`` below 1."""
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is not a positive number.")
        prompt = self.tokenizer.encode(text)
        first, *others = (self._end_ids if end_id is None else (end_id,)) or (NO_END,)
        rows: dict[str, Sequence[Any]] = {
            "input_ids": prompt,
            "input_lengths": [len(prompt)],
            "request_output_len": [max_tokens],
            "stop_words_list": word_list([*((token,) for token in others), *word_ids(stop_words, self.tokenizer)]),
            "bad_words_list": word_list(word_ids(bad_words, self.tokenizer)),
            "end_id": [first],
            "pad_id": [max(first, 0) if pad_id is None else pad_id],
        }
        return {name: np.array([row], np.int32) for name, row in rows.items()}

    def writer(self, stop_words: Sequence[str]) -> Writer:
        """What makes one sequence's text of its tokens."""
        detokenizer = Detokenizer(self.tokenizer.decode, self._settled)
        return Writer(0, lambda index, piece: None, detokenizer, StopWords(tuple(stop_words)))

    def whole(self, token_ids: Sequence[int], stop_words: Sequence[str]) -> str:
        """Text of a finished sequence, up to its first stop word."""
        tail = Tail(self.writer(stop_words))
        tail.push(token_ids)
        tail.finish()
        return tail.writer.text


class Tail:
    """What follows the prompt in one sequence: text, how much of it has been handed out, and the engine's last tensors of it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.over = False
        self.tensors: Tensors = {}
        self._taken = 0

    def push(self, token_ids: Sequence[int]) -> None:
        """Add the tokens of one response; a stop word ends the sequence, whatever follows."""
        self.over = self.over or any(self.writer.push(token) for token in token_ids)

    def finish(self) -> None:
        """Add what was held back."""
        if not self.over:
            self.writer.flush()
            self.over = True

    def take(self) -> str:
        """The text since the last call."""
        pieces = self.writer.pieces[self._taken :]
        self._taken += len(pieces)
        return "".join(pieces)


class LegacyCall:
    """One client's request to ``tensorrt_llm_bls``: what to ask the engine, and what to answer as its responses arrive."""

    def __init__(self, text: LegacyText, given: Tensors) -> None:
        """``given`` are the client's tensors. Raises :class:`UsageError` for strings that are no UTF-8."""
        self._text, self._given = text, given
        self._query = decoded(given["text_input"].reshape(-1)[0], "text_input")
        self._stop_words = words_of(given, "stop_words")
        self._stream = bool(self._number("stream", False))
        self._prefix = "" if self._number("exclude_input_in_output", True) else self._query
        self._tails: dict[int, Tail] = {}

    def _number(self, name: str, default: Any) -> Any:
        return self._given[name].reshape(-1)[0].item() if name in self._given else default

    def ask(self) -> Arrays:
        """The engine's tensors; raises :class:`UsageError` for what cannot be asked."""
        asked = self._text.ask(
            self._query,
            self._number("max_tokens", 0),
            self._stop_words,
            words_of(self._given, "bad_words"),
            self._number("end_id", None),
            self._number("pad_id", None),
        )
        asked |= {theirs: self._given[ours].reshape(1, 1) for ours, theirs in SAMPLING.items() if ours in self._given}
        return asked | {"streaming": np.array([[self._stream]]), "exclude_input_in_output": np.array([[True]])}

    @property
    def over(self) -> bool:
        """Whether all sequences have come to a stop word, so that the engine may stop."""
        return len(self._tails) == self._number("num_return_sequences", 1) and all(tail.over for tail in self._tails.values())

    def take(self, tensors: Tensors) -> list[Arrays]:
        """Responses to send at once for one of the engine's."""
        first = int(tensors["sequence_index"].reshape(-1)[0]) if "sequence_index" in tensors else 0
        responses = []
        for place, (ids, length) in enumerate(zip(tensors["output_ids"][0], tensors["sequence_length"][0], strict=True)):
            tail = self._tails.setdefault(first + place, Tail(self._text.writer(self._stop_words)))
            tail.tensors = tensors
            tail.push(ids[:length].tolist())
            responses += self._piece(first + place, tail)
        return responses

    def finish(self) -> list[Arrays]:
        """Responses that are left when the engine has ended; without streaming it is one, with the text of all sequences."""
        for tail in self._tails.values():
            tail.finish()
        if self._stream or not self._tails:
            return [piece for index, tail in self._tails.items() for piece in self._piece(index, tail)]
        tails = [tail for _, tail in sorted(self._tails.items())]
        names = [name for name in PER_SEQUENCE if all(name in tail.tensors for tail in tails)]
        joined = {name: join_padded([tail.tensors[name] for tail in tails]) for name in names}
        return [{"text_output": strings([self._prefix + tail.writer.text for tail in tails]), **joined}]

    def _piece(self, index: int, tail: Tail) -> list[Arrays]:
        text = tail.take() if self._stream else ""
        if not text:
            return []
        shown, self._prefix = self._prefix + text, ""
        passed_on = {name: tail.tensors[name] for name in PER_SEQUENCE if name in tail.tensors}
        return [{"text_output": strings([shown]), **passed_on, "sequence_index": np.array([[index]], np.int32)}]


def word_list(words: Sequence[Sequence[int]]) -> list[list[int]]:
    """Sequences of ids as the engine takes them, [2, N]: all ids in a row, and below where each sequence ends, padded with -1."""
    ids = [token for word in words for token in word] or [0]
    ends = [sum(map(len, words[: count + 1])) for count in range(len(words))]
    return [ids, ends + [-1] * (len(ids) - len(ends))]


def join_padded(arrays: Sequence[Array]) -> Array:
    """Join arrays [1, N, ...] along N, padding what follows with zeros to the longest."""
    longest = [max(sizes) for sizes in zip(*(array.shape[2:] for array in arrays), strict=True)]
    widths = [[(0, 0), (0, 0), *((0, to - size) for to, size in zip(longest, array.shape[2:], strict=True))] for array in arrays]
    return np.concatenate([np.pad(array, width) for array, width in zip(arrays, widths, strict=True)], axis=1)


def strings(texts: Sequence[str]) -> Array:
    """A STRING tensor, [1, N]."""
    return np.array([[text.encode() for text in texts]], np.object_)


def words_of(given: Tensors, name: str) -> list[str]:
    """The words of a list that clients pad with empty ones."""
    return [decoded(word, name) for word in given[name].reshape(-1) if word] if name in given else []


def decoded(value: bytes, name: str) -> str:
    """A client's string; raises :class:`UsageError` for bytes that are no UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not valid UTF-8 (byte {error.start}).", "Send text as UTF-8.") from None
