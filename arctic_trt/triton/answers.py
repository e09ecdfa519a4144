"""From what the ranks say of a request to the tensors of its responses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from arctic_trt.runtime.service.protocol import Event
from arctic_trt.triton.tensors import Array, Ask

Tensors = dict[str, Array]


@dataclass(slots=True)
class Answers:
    """The responses to one request: a piece at a time when it streams, otherwise one when all its choices are complete."""

    ask: Ask
    _begun: set[int] = field(default_factory=set)
    _sums: dict[int, float] = field(default_factory=dict)
    _done: dict[int, Event] = field(default_factory=dict)

    def take(self, events: Sequence[Event]) -> list[Tensors]:
        """The responses that ``events``, what is new since the last call, give rise to."""
        merged = list(merge(events))
        for event in merged:
            self._sums[event.choice] = self._sums.get(event.choice, 0.0) + sum(each.logprob for each in event.logprobs or ())
            if event.finish_reason is not None:
                self._done[event.choice] = event
        if self.ask.stream:
            return [self._response([event]) for event in merged]
        if not merged or len(self._done) < self.ask.choices:
            return []
        return [self._response([self._done[choice] for choice in range(self.ask.choices)])]

    def _response(self, events: list[Event]) -> Tensors:
        new = [event.choice not in self._begun for event in events]
        self._begun.update(event.choice for event in events)
        lengths = [len(event.token_ids) for event in events]
        ids = np.full((1, len(events), max(lengths)), self.ask.pad, np.int32)
        logprobs = np.zeros((1, len(events), max(lengths)), np.float32)
        for row, event in enumerate(events):
            ids[0, row, : lengths[row]] = event.token_ids
            if event.logprobs is not None:
                logprobs[0, row, : lengths[row]] = [each.logprob for each in event.logprobs]
        return {
            "output_ids": ids,
            "sequence_length": np.array([lengths], np.int32),
            "cum_log_probs": np.array([[self._sums[event.choice] for event in events]], np.float32),
            "output_log_probs": logprobs,
            "finish_reason": np.array([[(event.finish_reason or "").encode() for event in events]], np.object_),
            "sequence_index": np.array([[events[0].choice]], np.int32),
            "batch_index": np.zeros((1, 1), np.int32),
            "prompt_tokens": np.array([[len(self.ask.body["prompt"])]], np.int32),
            "context_ids": np.array([events[0].context_ids], np.int32),
            "prompt_ids": np.array([self.ask.body["prompt"] if self.ask.echo and all(new) else []], np.int32),
            "trim": np.array([[event.trim for event in events]], np.int32),
            "top_logprobs_json": np.array([[_top(event) for event in events]], np.object_),
        }


def merge(events: Iterable[Event]) -> list[Event]:
    """One event a choice, in the order of the choices' first: what came while the one before was being sent, all at once."""
    found: dict[int, Event] = {}
    for event in events:
        before = found.get(event.choice)
        found[event.choice] = event if before is None else joined(before, event)
    return list(found.values())


def joined(first: Event, second: Event) -> Event:
    """Two successive events of a choice as one: tokens of both, the context of the first, the end of the second."""
    logprobs = None if second.logprobs is None else (*(first.logprobs or ()), *second.logprobs)
    return replace(
        second,
        token_ids=(*first.token_ids, *second.token_ids),
        context_ids=first.context_ids,
        logprobs=logprobs,
    )


def failure_in(events: Iterable[Event]) -> Event | None:
    """The first of ``events`` that is an error."""
    return next((event for event in events if event.error is not None), None)


def _top(event: Event) -> bytes:
    """The likeliest tokens beside the chosen ones, as JSON; empty where log probabilities were not asked for."""
    if event.logprobs is None:
        return b""
    return json.dumps([[each.token, each.logprob, each.top] for each in event.logprobs]).encode()
