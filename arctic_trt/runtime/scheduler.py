"""Which tokens of which sequences are computed next: sequences join as soon as there is room and leave when they are done.

Every step takes one token of each sequence that is decoding, then fills up with parts of prompts. Nothing here computes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.step import Chunk, Step

PROMPT_LOGITS_A_STEP = 1024  # a step's logits are a [W, V] array: 131 MB at Arctic's vocabulary


@dataclass(slots=True)
class Sequence:
    """A request under way: ``tokens`` is the prompt and what was generated, of which ``computed`` are in the cache."""

    request: Request
    tokens: list[int]
    computed: int = 0

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def ready(self) -> bool:
        """All tokens are computed: the logits of the last one decide about the next."""
        return self.computed == len(self.tokens)

    @property
    def capacity(self) -> int:
        """Positions that are ever cached; the last token generated is not."""
        return max(1, len(self.request.prompt) + self.request.max_new_tokens - 1)


@dataclass(slots=True)
class _Budget:
    tokens: int
    prompt_logits: int = field(default=PROMPT_LOGITS_A_STEP)


class Scheduler:
    """Sequences waiting and active; at most ``max_batch_size`` are active, and a step has at most ``max_num_tokens`` tokens."""

    def __init__(self, *, max_batch_size: int, max_num_tokens: int) -> None:
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._freed: list[int] = []
        self._max_active = min(max_batch_size, max_num_tokens)
        self._max_num_tokens = max_num_tokens

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self._waiting.append(Sequence(request, list(request.prompt)))

    def sequence(self, index: int) -> Sequence:
        """The sequence of request ``index``, waiting or active."""
        return self._active.get(index) or next(waiting for waiting in self._waiting if waiting.request.index == index)

    def next_step(self) -> Step | None:
        """The next step, None when there are no sequences. Call :meth:`advance` before asking again."""
        while self._waiting and len(self._active) < self._max_active:
            sequence = self._waiting.popleft()
            self._active[sequence.request.index] = sequence
        if not self._active:
            return None
        budget = _Budget(self._max_num_tokens)
        # stable: within both groups the sequences keep the order in which they came
        ordered = sorted(self._active.values(), key=lambda sequence: sequence.num_generated == 0)
        chunks = tuple(chunk for chunk in (_plan_chunk(sequence, budget) for sequence in ordered) if chunk)
        freed, self._freed = tuple(self._freed), []
        return Step(chunks=chunks, freed=freed)

    def advance(self, chunk: Chunk) -> Sequence:
        """Note that ``chunk`` has been computed; returns its sequence."""
        sequence = self._active[chunk.sequence]
        sequence.computed += len(chunk.tokens)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out; the next step frees its cache."""
        if sequence.request.index not in self._active:
            self._waiting.remove(sequence)
            return
        del self._active[sequence.request.index]
        self._freed.append(sequence.request.index)


def _plan_chunk(sequence: Sequence, budget: _Budget) -> Chunk | None:
    request, start = sequence.request, sequence.computed
    prompt_logits = request.prompt_logits and start < len(request.prompt)
    unwanted = max(0, request.logits_from - start)
    count = min(len(sequence.tokens) - start, budget.tokens)
    if prompt_logits:
        count = min(count, unwanted + budget.prompt_logits)
    if not count:
        return None
    budget.tokens -= count
    whole = start + count == len(sequence.tokens)
    logits_from = count - whole
    if prompt_logits:
        logits_from = min(count, unwanted)
        budget.prompt_logits -= count - logits_from
    return Chunk(
        sequence=request.index,
        start=start,
        tokens=tuple(sequence.tokens[start : start + count]),
        capacity=0 if start else sequence.capacity,
        logits_from=logits_from,
    )
