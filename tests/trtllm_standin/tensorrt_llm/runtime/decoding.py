"""Tokens out of nothing: a rule that anyone can compute stands in for the network.

After a sequence of ``n`` tokens that ends in ``t``, the greedy token is ``(7 * t + n + 3) % vocab_size``. Sampling adds a draw
from a generator seeded with ``seed``, below ``top_k`` where that is set. Which settings are greedy, what is refused and how a
sequence ends are TensorRT-LLM's: ``samplingConfig.cpp`` of its executor, ``samplingTopKKernels.h`` and ``.cu`` of its kernels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorrt_llm.play import RELEASE

ACCEPTED = (
    *("num_beams", "top_k", "top_p", "top_p_min", "top_p_reset_ids", "top_p_decay", "temperature", "min_tokens"),
    *("beam_search_diversity_rate", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *(("prompt_ignore_length",) if RELEASE >= (1, 2) else ()),
    *("length_penalty", "early_stopping", "no_repeat_ngram_size", "random_seed", "num_return_sequences", "min_p"),
    "beam_width_array",
)
"""Keywords of ``generate`` that reach the sampler. Source: ``tensorrt_llm/runtime/model_runner_cpp.py`` of 1.0 to 1.2."""
RENAMED = {"num_beams": "beam_width", "random_seed": "seed"}


@dataclass
class SamplingConfig:
    """The executor's; what is None has the runtime's default. Raises RuntimeError for values that its checks reject."""

    beam_width: int = 1
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    num_return_sequences: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {
            "beam_width": self.beam_width <= 0,
            "top_k": self.top_k is not None and self.top_k < 0,
            "top_p": self.top_p is not None and not 0 < self.top_p <= 1,
            "temperature": self.temperature is not None and self.temperature < 0,
            "min_tokens": self.min_tokens is not None and self.min_tokens < 0,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise RuntimeError(f"[TensorRT-LLM][ERROR] Assertion failed: {name} = {getattr(self, name)} (samplingConfig.cpp)")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> SamplingConfig:
        """From keywords of ``generate``; a ``top_p`` of 0 means none."""
        given = {RENAMED.get(name, name): value for name, value in keywords.items() if name in ACCEPTED}
        if given.get("top_p") == 0.0:
            given["top_p"] = None
        own = {name: given.pop(name) for name in list(given) if name in cls.__dataclass_fields__}
        return cls(**own, others=given)

    @property
    def is_greedy(self) -> bool:
        return self.top_k == 1 or (not self.top_k and not self.top_p) or self.temperature == 0

    @property
    def num_sequences(self) -> int:
        return self.num_return_sequences or self.beam_width


def greedy_token(sequence: Sequence[int], vocab_size: int) -> int:
    """The token after ``sequence``."""
    return (7 * sequence[-1] + len(sequence) + 3) % vocab_size


def decode(
    prompt: Sequence[int],
    number: int,
    sampling: SamplingConfig,
    vocab_size: int,
    max_new_tokens: int,
    end_id: int | None,
    stop_words: Sequence[Sequence[int]],
    bad_words: Sequence[Sequence[int]],
) -> Iterator[int]:
    """New tokens of the ``number``-th sequence of a prompt. Stop words are part of it, the end token is not."""
    sequence, draws = list(prompt), random.Random(f"{sampling.seed or 0}/{number}")
    beam = number if sampling.beam_width > 1 else 0
    for step in range(max_new_tokens):
        token = greedy_token(sequence, vocab_size)
        if step == 0:
            token = (token + beam) % vocab_size
        if not sampling.is_greedy:
            token = (token + draws.randrange(min(sampling.top_k or vocab_size, vocab_size))) % vocab_size
        while any(ends_with([*sequence, token], word) for word in bad_words):
            token = (token + 1) % vocab_size
        if token == end_id and step >= (sampling.min_tokens or 0):
            return
        sequence.append(token)
        yield token
        if any(ends_with(sequence[len(prompt) :], word) for word in stop_words):
            return


def ends_with(sequence: Sequence[int], word: Sequence[int]) -> bool:
    return bool(word) and list(sequence[-len(word) :]) == list(word)
