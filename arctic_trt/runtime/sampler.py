"""Choosing the next token: the arithmetic on one row of float32 logits [V], in the order in which it is applied.

1. Bad words: a token that would complete one gets -inf, also where the prompt began it, as in Hugging Face's ``generate``.
2. Penalties. Repetition, over prompt and output: logits above 0 are divided by it, others multiplied (Keskar et al., 2019).
   Frequency, times a token's count in the output, and presence, once for a token of the output, are subtracted, as OpenAI's API
   defines them and vLLM applies them.
3. Temperature, ``top_k``, ``top_p`` of what is left, ``min_p``: the order of Hugging Face's ``generate``.

vLLM applies ``min_p`` before ``top_k`` and ``top_p``; TensorRT-LLM divides by the temperature before it applies the penalties,
and counts the prompt in all of them. Ties at a limit go to the lower token ids. A row is worked on alone and in numpy, whose
results for a row do not depend on where it lies: company changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from arctic_trt.errors import UsageError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)
BLOCK = 256  # a running sum is slow: of a vocabulary it is taken of blocks, and within one of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request chooses; None means that the restriction is off. Make one with :func:`plan_sampling`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Nothing asked for randomness, or what was asked for leaves one candidate."""
        asked = (self.temperature, self.top_k, self.top_p, self.min_p)
        return all(value is None for value in asked) or self.temperature == 0 or self.top_k == 1 or self.min_p == 1

    @property
    def penalizes(self) -> bool:
        """What was said before matters."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_argmax(self) -> bool:
        """Greedy without a penalty: the largest of the logits as they come."""
        return self.greedy and not self.penalizes


def plan_sampling(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    seed: int | None = None,
) -> Sampling:
    """Check the flags; 0 switches ``top_k``, ``top_p`` and ``min_p`` off. Raises :class:`UsageError`."""
    ranges: list[tuple[str, float | None, float, float, str]] = [
        ("--temperature", temperature, 0, LARGEST, "a finite number, 0 or more"),
        ("--top_k", top_k, 0, math.inf, "0 or more"),
        ("--top_p", top_p, 0, 1, "between 0 and 1"),
        ("--min_p", min_p, 0, 1, "between 0 and 1"),
        ("--repetition_penalty", repetition_penalty, SMALLEST, LARGEST, "a finite number, more than 0"),
        ("--presence_penalty", presence_penalty, -2, 2, "between -2 and 2"),
        ("--frequency_penalty", frequency_penalty, -2, 2, "between -2 and 2"),
        ("--random_seed", seed, 0, math.inf, "0 or more"),
    ]
    for flag, value, low, high, allowed in ranges:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} {value} is out of range, expected {allowed}.")
    return Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p or None,
        min_p=min_p or None,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        presence_penalty=presence_penalty or 0.0,
        frequency_penalty=frequency_penalty or 0.0,
        seed=seed or 0,
    )


def request_generator(seed: int, index: int) -> np.random.Generator:
    """The random stream of the request called ``index``, one number a token."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))


def forbidden_next(bad_words: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[int]:
    """Ids that would complete one of ``bad_words`` after ``tokens``, which are the prompt and the output."""
    found = []
    for *beginning, last in bad_words:
        if len(beginning) <= len(tokens) and list(tokens[len(tokens) - len(beginning) :]) == beginning:
            found.append(last)
    return found


def penalize_seen(logits_V: Floats, seen_V: npt.NDArray[np.bool_], penalty: float) -> None:
    """The repetition penalty, in place: logits above 0 divided by it, the others multiplied, and kept finite."""
    ids = np.flatnonzero(seen_V)
    values = logits_V[ids].astype(np.float64)
    finite = np.clip(np.where(values > 0, values / penalty, values * penalty), -LARGEST, LARGEST)
    logits_V[ids] = np.where(values == -np.inf, values, finite)


def penalize_counts(logits_V: Floats, counts_V: npt.NDArray[np.int32], presence: float, frequency: float) -> None:
    """The presence and the frequency penalty, in place; ``counts_V`` says how often the output has each token."""
    ids = np.flatnonzero(counts_V > 0)
    logits_V[ids] -= (presence + frequency * counts_V[ids]).astype(logits_V.dtype)


def candidates(logits_V: Floats, sampling: Sampling) -> tuple[Ids, Floats]:
    """The tokens that may be drawn, with weights in proportion to their probabilities.

    At least one token has the weight 1, provided that one logit is above -inf.
    """
    count = sampling.top_k or len(logits_V)
    ids = top(logits_V, count)
    weights = (logits_V if count >= len(logits_V) else logits_V[ids]) - logits_V.max()
    with np.errstate(over="ignore"):  # far below the largest, at a temperature near 0: a weight of 0
        weights /= 1.0 if sampling.temperature is None else max(sampling.temperature, SMALLEST)
    np.exp(weights, out=weights)
    if sampling.top_p is not None and sampling.top_p < 1:
        kept = nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    if sampling.min_p is not None:
        kept = np.flatnonzero(weights >= sampling.min_p)
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def nucleus(weights_N: Floats, top_p: float) -> Ids:
    """Indices of the smallest set of largest weights that make up ``top_p`` of the sum; never empty."""
    total = weights_N.sum(dtype=np.float64)
    # those below this cannot make up the rest of the sum even together, so that few are sorted unless they are alike
    able = np.flatnonzero(weights_N >= (1 - top_p) * total / len(weights_N))
    ordered = np.sort(weights_N[able])[::-1]
    count = min(int(np.searchsorted(ordered.cumsum(dtype=np.float64), top_p * total)) + 1, len(able))
    return able[_down_to(weights_N[able], ordered[count - 1], count)]


def top(values_N: Floats, count: int) -> Ids:
    """Indices of the ``count`` largest, in no order; all if there are fewer."""
    if count >= len(values_N):
        return _all(len(values_N))
    smallest = np.partition(values_N, len(values_N) - count)[len(values_N) - count]
    return _down_to(values_N, smallest, count)


def draw(ids_N: Ids, weights_N: Floats, generator: np.random.Generator) -> int:
    """One of ``ids_N``, by one random number; never one whose weight is 0."""
    ends = np.add.reduceat(weights_N, np.arange(0, len(weights_N), BLOCK), dtype=np.float64).cumsum()
    target = generator.random() * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    begin = block * BLOCK
    inside = weights_N[begin : begin + BLOCK].cumsum(dtype=np.float64)
    rest = target - ends[block - 1] if block else target
    # the block's sum, taken in another order, may differ in the last bit
    return int(ids_N[begin + np.searchsorted(inside, min(rest, np.nextafter(inside[-1], 0)), side="right")])


def log_sum_exp(logits_V: Floats) -> float:
    """What to subtract from a logit to get its log probability."""
    largest = logits_V.max()
    return float(largest) + math.log(np.exp(logits_V - largest).sum(dtype=np.float64))


def likeliest(values_V: Floats, count: int) -> list[int]:
    """Ids of the ``count`` largest, the largest first, equal ones by id; all if there are fewer."""
    if not count:
        return []
    ids = np.sort(top(values_V, count))
    return [int(index) for index in ids[np.argsort(-values_V[ids], kind="stable")]]


@lru_cache(maxsize=4)
def _all(count: int) -> Ids:
    ids = np.arange(count)
    ids.flags.writeable = False
    return ids


def _down_to(values_N: Floats, smallest: np.floating[Any], count: int) -> Ids:
    """Indices of the ``count`` largest, of which ``smallest`` is the last; of those equal to it the first."""
    above = np.flatnonzero(values_N > smallest)
    return np.concatenate((above, np.flatnonzero(values_N == smallest)[: count - len(above)]))
