"""From a step's logits to its tokens, each request by its own rules: what it said before, its bad words, its random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arctic_trt.errors import ArcticTrtError, UsageError
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import (
    SMALLEST,
    Floats,
    candidates,
    draw,
    forbidden_next,
    likeliest,
    log_sum_exp,
    penalize_counts,
    penalize_seen,
    request_generator,
)
from arctic_trt.runtime.step import LIKELIEST, Choice

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the probabilities by the model's own logits, before bad words, penalties and temperature.

    ``top`` has (token, logprob) of the likeliest tokens, the likeliest first; the chosen ``token`` need not be among them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Said:
    """What a sequence has in its prompt and its output, by token, kept so that a step costs no look at the whole."""

    def __init__(self, prompt: Sequence[int], vocab_size: int) -> None:
        self.seen_V: npt.NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)
        self.seen_V[list(prompt)] = True
        self.counts_V: npt.NDArray[np.int32] = np.zeros(vocab_size, np.int32)

    def add(self, token: int) -> None:
        """Count a token of the output."""
        self.seen_V[token] = True
        self.counts_V[token] += 1


class Chooser:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._sampling = request.sampling
        self._generator = request_generator(request.sampling.seed, request.index if request.stream is None else request.stream)
        self._said: Said | None = None
        self._logprobs: list[TokenLogprobs] = []

    @property
    def index(self) -> int:
        return self._request.index

    @property
    def is_argmax(self) -> bool:
        """The largest of the logits as they come is chosen."""
        return self._sampling.is_argmax and not self._request.bad_words

    @property
    def by_ranks(self) -> bool:
        """The ranks can choose: nothing but a token comes of the logits, and nothing said before matters."""
        request, sampling = self._request, self._sampling
        return not (sampling.penalizes or request.bad_words or request.prompt_logits or request.logprobs is not None)

    def next_choice(self) -> Choice:
        """What the ranks need to choose the next token as :meth:`choose` does; it takes the token's random number."""
        sampling = self._sampling
        if sampling.greedy:
            return LIKELIEST
        return Choice(
            temperature=1.0 if sampling.temperature is None else max(sampling.temperature, SMALLEST),
            top_k=sampling.top_k or 0,
            top_p=1.0 if sampling.top_p is None else sampling.top_p,
            min_p=sampling.min_p or 0.0,
            uniform=self._generator.random(),
        )

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of the tokens chosen so far, if the request wants them."""
        return self.logprobs_from(0)

    def logprobs_from(self, begin: int) -> tuple[TokenLogprobs, ...] | None:
        """The same, without those of the first ``begin`` tokens."""
        return None if self._request.logprobs is None else tuple(self._logprobs[begin:])

    def choose(self, logits_V: Floats, tokens: Sequence[int]) -> int:
        """The next token after ``tokens``, prompt and output; raises :class:`UsageError` when bad words leave none."""
        adjusted_V = self._adjust(logits_V, tokens)
        token = int(adjusted_V.argmax())
        if adjusted_V[token] == -np.inf:
            raise UsageError(
                f"The bad words of prompt {self._request.index} leave no token after {len(tokens)}.", "Forbid fewer words."
            )
        if not self._sampling.greedy:
            token = draw(*candidates(adjusted_V, self._sampling), self._generator)
        return token

    def add(self, logits_V: Floats, token: int) -> None:
        """Take note of ``token``, which was chosen from ``logits_V``."""
        if self._said is not None:
            self._said.add(token)
        if self._request.logprobs is not None:
            norm = log_sum_exp(logits_V)
            top = tuple((index, float(logits_V[index]) - norm) for index in likeliest(logits_V, self._request.logprobs))
            self._logprobs.append(TokenLogprobs(token, float(logits_V[token]) - norm, top))

    def _adjust(self, logits_V: Floats, tokens: Sequence[int]) -> Floats:
        """The logits after bad words and penalties; others are left as they are."""
        sampling = self._sampling
        if not sampling.penalizes and not self._request.bad_words:
            return logits_V
        adjusted_V: Floats = logits_V.copy()
        adjusted_V[forbidden_next(self._request.bad_words, tokens)] = -np.inf
        if sampling.penalizes:
            if self._said is None:
                self._said = Said(self._request.prompt, len(logits_V))
            if sampling.repetition_penalty != 1:
                penalize_seen(adjusted_V, self._said.seen_V, sampling.repetition_penalty)
            penalize_counts(adjusted_V, self._said.counts_V, sampling.presence_penalty, sampling.frequency_penalty)
        return adjusted_V


def choose_tokens(logits_WV: Tensor, choosers: Sequence[Chooser], tokens: Sequence[Sequence[int]]) -> list[int | ArcticTrtError]:
    """The next token for each of the sequences, whose ``tokens`` are prompt and output, or why it has none.

    The logits are float32 on the CPU; a row that is not finite has no token, nor has one whose bad words leave none.
    """
    largest = logits_WV.argmax(-1).tolist()
    finite = logits_WV.sum(-1).isfinite().tolist()  # a sum is as finite as what is summed, and five times as fast to ask
    chosen: list[int | ArcticTrtError] = []
    for row, chooser in enumerate(choosers):
        logits_V = logits_WV[row].numpy()
        if not finite[row]:
            chosen.append(broken_logits(chooser.index, len(tokens[row]) - 1))
            continue
        try:
            token = largest[row] if chooser.is_argmax else chooser.choose(logits_V, tokens[row])
        except ArcticTrtError as error:
            chosen.append(error)
            continue
        chooser.add(logits_V, token)
        chosen.append(token)
    return chosen


def broken_logits(index: int, position: int) -> ArcticTrtError:
    """What to say of logits that are not finite."""
    return ArcticTrtError(
        f"The logits of prompt {index} at position {position} are not finite.",
        "A scale of the checkpoint is probably wrong: verify it, or quantize again.",
    )
