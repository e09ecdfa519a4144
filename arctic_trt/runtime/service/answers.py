"""From what the batcher tells to events: which tokens of which choice of which call are new and have certain text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.service.protocol import Event, failure
from arctic_trt.runtime.service.text import chunk_text

Logprobs = tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a client asked for: a request for each choice. ``arrived`` is a reading of :func:`time.monotonic`."""

    id: int
    requests: list[Request]
    stream: bool
    arrived: float = field(default_factory=time.monotonic)

    @property
    def needs_text(self) -> bool:
        """Text has to be known while tokens come: to cut it into events, or to find stop words in it."""
        return self.stream or bool(self.requests[0].stop_words)


@dataclass(slots=True)
class _Open:
    """A call under way."""

    call: Call
    unfinished: int
    first_token_s: float | None = None


@dataclass(slots=True)
class _Choice:
    """One of its choices: ``sent`` tokens and ``sent_text`` characters are in events, ``context`` is the last one's tokens."""

    open: _Open
    number: int
    sent: int = 0
    text: int = 0
    sent_text: int = 0
    context: tuple[int, ...] = ()


class Answers:
    """Calls under way, and the events that are to be sent; of a call that does not stream, one for each choice."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.generated_tokens = 0
        self.broken: list[tuple[int, ArcticTrtError]] = []
        """Calls that cannot go on, each to be failed after the step."""
        self._decode = decode
        self._events: list[Event] = []
        self._choices: dict[int, _Choice] = {}
        self._open: dict[int, _Open] = {}

    @property
    def listeners(self) -> Listeners:
        """For the batcher that computes the calls."""
        return Listeners(
            on_piece=self._on_piece,
            on_token=self._on_token,
            on_settled=self._on_settled,
            on_done=self._on_done,
            on_error=self._on_error,
        )

    def begin(self, call: Call) -> None:
        """Take note of a call whose requests are in the batcher."""
        opened = self._open[call.id] = _Open(call, len(call.requests))
        for number, request in enumerate(call.requests):
            self._choices[request.index] = _Choice(opened, number)

    def fail(self, call: int, code: str, message: str) -> None:
        """End a call, which need not have begun, with an error; what the batcher still tells of it has no effect."""
        opened = self._open.pop(call, None)
        for request in opened.call.requests if opened else ():
            self._choices.pop(request.index, None)
        self._events.append(failure(call, code, message))

    def indices(self, call: int) -> list[int]:
        """The requests of a call that are under way."""
        opened = self._open.get(call)
        return [request.index for request in opened.call.requests if request.index in self._choices] if opened else []

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def _on_piece(self, index: int, piece: str) -> None:
        self._choices[index].text += len(piece)

    def _on_token(self, index: int, token: int) -> None:
        self.generated_tokens += 1
        opened = self._choices[index].open
        if opened.first_token_s is None:
            opened.first_token_s = time.monotonic() - opened.call.arrived

    def _on_settled(self, index: int, tokens: list[int], logprobs: Logprobs) -> None:
        choice = self._choices[index]
        if not choice.open.call.stream:
            return
        self._events.append(self._event(choice, tuple(tokens), logprobs))
        choice.sent, choice.sent_text, choice.context = choice.sent + len(tokens), choice.text, tuple(tokens)

    def _on_done(self, index: int, completion: Completion) -> None:
        choice = self._choices.pop(index, None)
        if choice is None:  # another choice of its call has failed
            return
        opened = choice.open
        opened.unfinished -= 1
        final = not opened.unfinished
        if final:
            del self._open[opened.call.id]
        tokens = completion.token_ids[choice.sent :]
        logprobs = None if completion.logprobs is None else completion.logprobs[choice.sent :]
        self._events.append(
            self._event(
                choice,
                tokens,
                logprobs,
                trim=self._trim(choice, tokens, completion.text),
                finish_reason=completion.finish_reason,
                final=final,
                first_token_s=opened.first_token_s if final else None,
                total_s=time.monotonic() - opened.call.arrived if final else None,
            )
        )

    def _on_error(self, index: int, error: ArcticTrtError) -> None:
        call = self._choices.pop(index).open.call
        self.broken.append((call.id, error))

    def _trim(self, choice: _Choice, tokens: tuple[int, ...], text: str) -> int:
        """Characters of the tokens' text that a stop word took."""
        if not choice.open.call.requests[0].stop_words:
            return 0
        return len(chunk_text(self._decode, choice.context, tokens)) - (len(text) - choice.sent_text)

    def _event(self, choice: _Choice, tokens: tuple[int, ...], logprobs: Logprobs, **more: object) -> Event:
        call = choice.open.call
        return Event(
            id=call.id,
            choice=choice.number,
            token_ids=tokens,
            context_ids=choice.context,
            logprobs=logprobs,
            prompt_tokens=len(call.requests[0].prompt),
            **more,  # type: ignore[arg-type]
        )
