"""How likely an engine finds text that is there already.

A sequence goes through the engine like any prompt, without its last token, which nothing follows. Of the logits a sum and a yes
or no a sequence are kept, step by step, so that memory does not grow with the text.

Legend: W positions of a step whose logits are wanted, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.runtime.chooser import broken_logits
from arctic_trt.runtime.requests import Request, check_vocabulary
from arctic_trt.runtime.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Continuation:
    """``tokens`` of a sequence, of which those from ``begin`` on are scored, given all before them; ``begin`` is at least 1."""

    tokens: tuple[int, ...]
    begin: int

    @property
    def context(self) -> tuple[int, ...]:
        """What the engine has to compute."""
        return self.tokens[:-1]


@dataclass(slots=True)
class Score:
    """``log_prob`` is the sum over the scored tokens, in nats; ``greedy`` whether each of them is the likeliest."""

    log_prob: float = 0.0
    greedy: bool = True


class Scorer:
    """Requests for continuations, and what comes of them; continuations of one context share a request."""

    def __init__(self, continuations: Sequence[Continuation], limits: BuildConfig, vocab_size: int) -> None:
        """Raises :class:`UsageError` naming a continuation that the engine cannot take."""
        self.scores = [Score() for _ in continuations]
        self._continuations = continuations
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, continuation in enumerate(continuations):
            _check(index, continuation, limits, vocab_size)
            sharing.setdefault(continuation.context, []).append(index)
        self._members = list(sharing.values())
        self.requests = [
            Request(
                index=index,
                prompt=context,
                max_new_tokens=1,  # the next token is chosen from logits that are wanted anyway
                sampling=Sampling(),
                prompt_logits=True,
                logits_from=min(continuations[member].begin for member in members) - 1,
            )
            for index, (context, members) in enumerate(sharing.items())
        ]

    def add(self, request: int, start: int, logits_WV: Tensor) -> None:
        """Take the logits of a request's positions ``start`` and on; raises :class:`ArcticTrtError` if they are not finite."""
        finite = logits_WV.isfinite().all(-1).tolist()
        if not all(finite):
            raise broken_logits(request, start + finite.index(False))
        log_sum_W, likeliest_W = logits_WV.logsumexp(-1), logits_WV.argmax(-1)
        for member in self._members[request]:
            continuation, score = self._continuations[member], self.scores[member]
            first = max(0, continuation.begin - 1 - start)
            next_W = torch.tensor(continuation.tokens[start + first + 1 : start + len(logits_WV) + 1], dtype=torch.int64)
            if len(next_W):
                chosen_W = logits_WV[first:].gather(1, next_W[:, None])[:, 0]
                score.log_prob += float((chosen_W - log_sum_W[first:]).sum(dtype=torch.float64))
                score.greedy = score.greedy and likeliest_W[first:].equal(next_W)


def _check(index: int, continuation: Continuation, limits: BuildConfig, vocab_size: int) -> None:
    if not 1 <= continuation.begin < len(continuation.tokens):
        raise UsageError(
            f"Continuation {index} begins at token {continuation.begin} of {len(continuation.tokens)}, expected a token or more "
            "before it, and one or more in it."
        )
    check_vocabulary(index, continuation.tokens, vocab_size)
    if len(continuation.context) > limits.max_input_len:
        raise UsageError(
            f"Continuation {index} needs {len(continuation.context)} tokens before its last one, the engine was built for "
            f"--max_input_len {limits.max_input_len}.",
            "Shorten it, or build the engine with a larger one.",
        )
