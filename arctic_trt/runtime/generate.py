"""Rank 0's loop: ask the scheduler, have the ranks compute, choose tokens, and notice when a sequence is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.detokenizer import Detokenizer, StopWords
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import choose, request_generator
from arctic_trt.runtime.scheduler import Scheduler, Sequence
from arctic_trt.runtime.step import Step

Execute = Callable[[Step], Tensor | None]
OnPiece = Callable[[int, str], None]
OnPromptLogits = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of one request; ``token_ids`` are the generated ones, with the end token if it came to one."""

    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(slots=True)
class Writer:
    """One sequence's way from tokens to text; without a detokenizer there is no text."""

    index: int
    on_piece: OnPiece
    detokenizer: Detokenizer | None
    stop_words: StopWords
    generator: torch.Generator
    pieces: list[str] = field(default_factory=list)

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

    def _add(self, piece: str) -> bool:
        text, stopped = self.stop_words.push(piece)
        self._emit(text)
        return stopped

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.on_piece(self.index, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who is told while generation goes on: of text (request, piece), and of prompt logits (request, first position, [W, V])."""

    on_piece: OnPiece = lambda index, piece: None
    on_prompt_logits: OnPromptLogits = lambda index, start, logits_WV: None


def generate(
    execute: Execute,
    requests: list[Request],
    limits: BuildConfig,
    *,
    detokenizer: Callable[[], Detokenizer | None] = lambda: None,
    stop_words: tuple[str, ...] = (),
    listeners: Listeners | None = None,
) -> list[Completion]:
    """Complete ``requests`` and return the completions in their order.

    ``execute`` computes a step on all ranks and returns the wanted logits [W, V]. Raises :class:`ArcticTrtError` when an
    engine's logits are not finite.
    """
    listeners = listeners or Listeners()
    scheduler = Scheduler(requests, max_batch_size=limits.max_batch_size, max_num_tokens=limits.max_num_tokens)
    writers = {
        request.index: Writer(
            request.index,
            listeners.on_piece,
            detokenizer(),
            StopWords(stop_words),
            request_generator(request.sampling.seed, request.index),
        )
        for request in requests
    }
    done: dict[int, Completion] = {}
    while (step := scheduler.next_step()) is not None:
        ready = _compute(execute, scheduler, step, listeners.on_prompt_logits)
        for (sequence, _), token in zip(ready, _choose_tokens(ready, writers), strict=True):
            writer = writers[sequence.request.index]
            reason = _extend(sequence, token, writer)
            if reason:
                scheduler.finish(sequence)
                done[writer.index] = _complete(sequence, writer, reason)
    return [done[request.index] for request in requests]


def _compute(
    execute: Execute, scheduler: Scheduler, step: Step, on_prompt_logits: OnPromptLogits
) -> list[tuple[Sequence, Tensor]]:
    """Run a step; returns the sequences whose next token can be chosen now, with the logits [V] to choose from."""
    logits_WV, row, ready = execute(step), 0, []
    for chunk in step.chunks:
        sequence = scheduler.advance(chunk)
        if not chunk.num_logits or logits_WV is None:
            continue
        mine_WV = logits_WV[row : row + chunk.num_logits]
        row += chunk.num_logits
        if sequence.request.prompt_logits and chunk.start < len(sequence.request.prompt):
            on_prompt_logits(chunk.sequence, chunk.start + chunk.logits_from, mine_WV)
        if sequence.ready:
            ready.append((sequence, mine_WV[-1]))
    return ready


def _choose_tokens(ready: list[tuple[Sequence, Tensor]], writers: dict[int, Writer]) -> list[int]:
    if not ready:
        return []
    logits_WV = torch.stack([logits_V for _, logits_V in ready])
    finite = logits_WV.isfinite().all(-1).tolist()
    if not all(finite):
        broken = ready[finite.index(False)][0]
        raise broken_logits(broken.request.index, broken.computed - 1)
    largest = logits_WV.argmax(-1).tolist()
    return [
        largest[row]
        if sequence.request.sampling.is_argmax
        else choose(logits_V, sequence.request.sampling, sequence.tokens, writers[sequence.request.index].generator)
        for row, (sequence, logits_V) in enumerate(ready)
    ]


def broken_logits(index: int, position: int) -> ArcticTrtError:
    """What to raise for logits that are not finite."""
    return ArcticTrtError(
        f"The logits of prompt {index} at position {position} are not finite.",
        "A scale of the checkpoint is probably wrong: verify it, or quantize again.",
    )


def _extend(sequence: Sequence, token: int, writer: Writer) -> str | None:
    """Add a token; returns why the sequence ends with it, or None."""
    request = sequence.request
    sequence.tokens.append(token)
    if writer.push(token) or token in request.end_ids:
        return "stop"
    return "length" if sequence.num_generated == request.max_new_tokens else None


def _complete(sequence: Sequence, writer: Writer, reason: str) -> Completion:
    reason = "stop" if writer.flush() else reason
    return Completion(prompt=sequence.request.prompt, token_ids=tuple(sequence.generated), text=writer.text, finish_reason=reason)
