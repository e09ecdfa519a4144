"""Rank 0's loop, one step at a time: requests join and leave between any two steps.

A step asks the scheduler, has the ranks compute, chooses tokens, and notices which sequences are done. Where the ranks choose by
themselves, the next step is begun before this one's tokens are here: then what becomes of a sequence is noticed a step later, and
a token that was computed too many is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.chooser import Chooser, broken_logits, choose_tokens
from arctic_trt.runtime.completion import CANCELLED, Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer, StopWords, Writer
from arctic_trt.runtime.kv_budget import check_fits, room_for
from arctic_trt.runtime.outcome import BROKEN, Outcome
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.scheduler import Scheduler, Sequence, Stats
from arctic_trt.runtime.step import STEP_TOKENS, Step, most_step_tokens

logger = logging.getLogger(__name__)

Execute = Callable[[Step], Outcome | None]


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that the ranks compute, the sequences of its chunks, and what will come of it, if anything is wanted."""

    step: Step
    sequences: list[Sequence]
    outcome: Outcome | None


class Batcher:
    """Requests under way in one engine.

    ``execute`` has all ranks compute a step and returns what comes of it. With ``ahead`` the ranks choose the tokens of requests
    that allow it, and a step may be executed before the one before it has been computed. Steps with prompts have ``step_tokens``
    at most, or what the ``limits`` allow. ``room`` is what the ranks' caches have; None is room for all that the ``limits`` allow
    at once. Between two steps requests may be added and cancelled; what comes of each is told to ``listeners``. Not safe to use
    from several threads at once.
    """

    def __init__(
        self,
        execute: Execute,
        limits: BuildConfig,
        *,
        ahead: bool = False,
        step_tokens: int = STEP_TOKENS,
        room: KvRoom | None = None,
        detokenizer: Callable[[], Detokenizer | None] = lambda: None,
        listeners: Listeners | None = None,
    ) -> None:
        self._execute = execute
        self._ahead = ahead
        self._next: Begun | None = None
        self._room = room or room_for(limits)
        self._scheduler = Scheduler(
            self._room,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=most_step_tokens(limits, step_tokens),
        )
        self._detokenizer = detokenizer
        self._listeners = listeners or Listeners()
        self._writers: dict[int, Writer] = {}
        self._choosers: dict[int, Chooser] = {}

    @property
    def idle(self) -> bool:
        """Nothing is under way."""
        return not self._writers

    @property
    def stats(self) -> Stats:
        """Of the cache, and of the work since the start."""
        return self._scheduler.stats

    def add(self, request: Request, *, text: bool = True) -> None:
        """Let a request in; its index must not be under way. Raises :class:`UsageError` for one that the cache cannot hold.

        Without ``text`` there is none, and stop words have no effect.
        """
        check_fits(request, self._room)
        chooser = Chooser(request)
        self._scheduler.add(request, chooser.next_choice if self._ahead and chooser.by_ranks else None)
        self._writers[request.index] = Writer(
            request.index,
            self._listeners.on_piece,
            self._detokenizer() if text else None,
            StopWords(request.stop_words),
        )
        self._choosers[request.index] = chooser

    def cancel(self, index: int) -> None:
        """Take a request out, with what it has so far; nothing happens if it is not under way any more."""
        if index in self._writers:
            self._finish(self._scheduler.sequence(index), CANCELLED)

    def step(self) -> None:
        """Compute once, or wait for what is being computed and begin what comes next. Nothing happens when idle.

        Raises :class:`ArcticTrtError` when the logits are not finite or bad words leave no token, unless a listener takes it.
        """
        begun = self._next or self._begin()
        if begun is None:
            return
        self._next = self._begin() if self._ahead and begun.step.foreseen else None
        for sequence, token in self._next_tokens(begun):
            if isinstance(token, ArcticTrtError):
                self._fail(sequence, token)
            elif reason := self._extend(sequence, token):
                self._finish(sequence, reason)
            else:
                self._settle(sequence)
        if self.idle:
            self._next = None  # tokens that nobody wants

    def _begin(self) -> Begun | None:
        """Have the next step computed."""
        step = self._scheduler.next_step()
        if step is None:
            return None
        outcome = self._execute(step)
        return Begun(step, [self._scheduler.advance(chunk) for chunk in step.chunks], outcome)

    def _next_tokens(self, begun: Begun) -> list[tuple[Sequence, int | ArcticTrtError]]:
        """Wait for a step; returns the next tokens of its sequences, as far as they are still under way, or why there is none."""
        step, outcome = begun.step, begun.outcome
        if outcome is None:
            return []
        chosen = self._take_tokens(begun, outcome) if self._ahead else {}
        if not step.foreseen:
            chosen |= self._choose_tokens(self._take_logits(begun, outcome))
        return [(sequence, chosen[sequence]) for sequence in begun.sequences if sequence in chosen]

    def _take_tokens(self, begun: Begun, outcome: Outcome) -> dict[Sequence, int | ArcticTrtError]:
        """What the ranks chose. Waits for a step in which they chose nothing, too: no more than two are under way."""
        chunks = zip(begun.step.chunks, begun.sequences, strict=True)
        choosing = [sequence for chunk, sequence in chunks if chunk.choice is not None]
        return {
            sequence: broken_logits(sequence.request.index, len(sequence.tokens) - 1) if token == BROKEN else token
            for sequence, token in zip(choosing, outcome.tokens(), strict=True)
            if not sequence.done
        }

    def _take_logits(self, begun: Begun, outcome: Outcome) -> list[tuple[Sequence, Tensor]]:
        """The sequences whose next token is to be chosen here, with the logits [V] to choose from; tells of prompt logits."""
        logits_WV, row, ready = outcome.logits(), 0, []
        for chunk, sequence in zip(begun.step.chunks, begun.sequences, strict=True):
            if not chunk.num_logits or chunk.choice is not None:
                continue
            mine_WV = logits_WV[row : row + chunk.num_logits]
            row += chunk.num_logits
            first = chunk.start + chunk.logits_from
            if sequence.done:
                continue
            if sequence.request.prompt_logits and first < len(sequence.request.prompt):
                self._listeners.on_prompt_logits(chunk.sequence, first, mine_WV)
            if sequence.ready:
                ready.append((sequence, mine_WV[-1]))
        return ready

    def _choose_tokens(self, ready: list[tuple[Sequence, Tensor]]) -> dict[Sequence, int | ArcticTrtError]:
        """The tokens, or why there is none, in the order of ``ready``."""
        if not ready:
            return {}
        logits_WV = torch.stack([logits_V for _, logits_V in ready])
        sequences = [sequence for sequence, _ in ready]
        choosers = [self._choosers[sequence.request.index] for sequence in sequences]
        chosen = choose_tokens(logits_WV, choosers, [sequence.tokens for sequence in sequences])
        return dict(zip(sequences, chosen, strict=True))

    def _extend(self, sequence: Sequence, token: int) -> str | None:
        """Add a token; returns why the sequence ends with it, or None."""
        request = sequence.request
        sequence.learn(token)
        self._listeners.on_token(request.index, token)
        if self._writers[request.index].push(token) or token in request.end_ids:
            return "stop"
        return "length" if sequence.num_generated == request.max_new_tokens else None

    def _settle(self, sequence: Sequence) -> None:
        index = sequence.request.index
        writer = self._writers[index]
        if writer.settled:
            begin, writer.num_settled = writer.num_settled, sequence.num_generated
            self._listeners.on_settled(index, sequence.generated_from(begin), self._choosers[index].logprobs_from(begin))

    def _fail(self, sequence: Sequence, error: ArcticTrtError) -> None:
        if self._listeners.on_error is None:
            raise error
        index = sequence.request.index
        self._scheduler.finish(sequence)
        del self._writers[index], self._choosers[index]
        self._listeners.on_error(index, error)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        request = sequence.request
        self._scheduler.finish(sequence)
        writer, chooser = self._writers.pop(request.index), self._choosers.pop(request.index)
        reason = "stop" if writer.flush() else reason
        completion = Completion(
            prompt=request.prompt,
            token_ids=tuple(sequence.generated),
            text=writer.text,
            finish_reason=reason,
            logprobs=chooser.logprobs,
        )
        self._listeners.on_done(request.index, completion)


def generate(
    execute: Execute,
    requests: list[Request],
    limits: BuildConfig,
    *,
    ahead: bool = False,
    step_tokens: int = STEP_TOKENS,
    room: KvRoom | None = None,
    detokenizer: Callable[[], Detokenizer | None] = lambda: None,
    listeners: Listeners | None = None,
) -> list[Completion]:
    """Complete ``requests`` and return the completions in their order; parameters and errors are those of :class:`Batcher`."""
    told = listeners or Listeners()
    done: dict[int, Completion] = {}

    def on_done(index: int, completion: Completion) -> None:
        done[index] = completion
        told.on_done(index, completion)

    telling = replace(told, on_done=on_done)
    batcher = Batcher(
        *(execute, limits), ahead=ahead, step_tokens=step_tokens, room=room, detokenizer=detokenizer, listeners=telling
    )
    for request in requests:
        batcher.add(request)
    while not batcher.idle:
        batcher.step()
    stats = batcher.stats
    logger.debug(
        "%d tokens computed, %d found in the KV cache, %d preemptions.",
        *(stats.computed_tokens, stats.reused_tokens, stats.preemptions),
    )
    return [done[request.index] for request in requests]
