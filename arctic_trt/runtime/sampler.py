"""Choosing the next token from float32 logits [V], by the rules of TensorRT-LLM and Hugging Face.

Each request draws from a generator of its own, seeded from its seed and its index, so that a result does not depend on which
other requests happen to share its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from arctic_trt.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request chooses; None means that the restriction is off. Make one with :func:`plan_sampling`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Nothing asked for randomness, or what was asked for leaves one candidate."""
        nothing = self.temperature is None and self.top_k is None and self.top_p is None
        return nothing or self.temperature == 0 or self.top_k == 1

    @property
    def is_argmax(self) -> bool:
        """Greedy without a penalty: the largest of the logits as they come."""
        return self.greedy and self.repetition_penalty == 1


def plan_sampling(
    *,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> Sampling:
    """Check the flags; as in TensorRT-LLM, 0 switches ``top_k`` and ``top_p`` off. Raises :class:`UsageError`."""
    smallest = torch.finfo(torch.float32).tiny
    ranges: list[tuple[str, float | None, float, float, str]] = [
        ("--temperature", temperature, 0, math.inf, "0 or more"),
        ("--top_k", top_k, 0, math.inf, "0 or more"),
        ("--top_p", top_p, 0, 1, "between 0 and 1"),
        ("--repetition_penalty", repetition_penalty, smallest, math.inf, "more than 0"),
        ("--random_seed", seed, 0, math.inf, "0 or more"),
    ]
    for flag, value, low, high, allowed in ranges:
        if value is not None and not low <= value <= high:
            raise UsageError(f"{flag} {value} is out of range, expected {allowed}.")
    return Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p or None,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        seed=seed or 0,
    )


def request_generator(seed: int, index: int) -> torch.Generator:
    """The generator of the ``index``-th request."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def choose(logits_V: Tensor, sampling: Sampling, history: Sequence[int], generator: torch.Generator) -> int:
    """One token id; ``history`` is the prompt and what was generated so far."""
    if sampling.repetition_penalty != 1:
        logits_V = penalize(logits_V, history, sampling.repetition_penalty)
    if sampling.greedy:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, sampling), 1, generator=generator))


def penalize(logits_V: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    """Make seen tokens less likely: positive logits divided by ``penalty``, negative ones multiplied (Keskar et al., 2019)."""
    seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
    values = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))


def probabilities(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """The distribution [V] that is drawn from: temperature, then the ``top_k`` likeliest, then the ``top_p`` nucleus of those."""
    scaled_V = logits_V / (1.0 if sampling.temperature is None else sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < len(scaled_V):
        kept = scaled_V.topk(sampling.top_k).indices
        scaled_V = torch.full_like(scaled_V, float("-inf")).index_copy(0, kept, scaled_V[kept])
    share_V = scaled_V.softmax(-1)
    return share_V if sampling.top_p is None else nucleus(share_V, sampling.top_p)


def nucleus(share_V: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens whose shares reach ``top_p``, renormalised; never empty."""
    ordered, index = share_V.sort(descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.where(before < top_p, 0.0)
    ordered[0] = ordered[0].clamp_min(torch.finfo(ordered.dtype).tiny)
    return torch.zeros_like(share_V).index_copy(0, index, ordered / ordered.sum())
