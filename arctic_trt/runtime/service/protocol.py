"""What leader and rank 0 say to each other: a JSON object a line, over a unix socket.

The leader says ``{"type": "request", "id": N, "body": {...}, "end_ids": [...] or null}``, whose body is a flat line of a batch
job and may have ``stream``, and ``{"type": "cancel", "id": N}``; when it closes the socket, rank 0 leaves. Rank 0 says once
``{"type": "ready", ...}`` with the fields of :class:`Limits`, and then, and after each step, ``{"type": "step", "events": [...],
"stats": {...}}``. Neither torch nor MPI is needed to speak it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from arctic_trt.runtime.chooser import TokenLogprobs

READY, STEP, REQUEST, CANCEL = "ready", "step", "request", "cancel"
INVALID, INTERNAL, UNAVAILABLE = "invalid", "internal", "unavailable"
"""Codes of errors: the request is wrong; it was lost, ask again; nobody can take it now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine takes."""

    max_input_len: int
    max_seq_len: int
    max_batch_size: int
    vocab_size: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStats:
    """Requests and KV blocks now, and counts since the ranks started; ``batch_size`` is the last step's."""

    waiting: int = 0
    active: int = 0
    batch_size: int = 0
    blocks: int = 0
    blocks_in_use: int = 0
    blocks_cached: int = 0
    steps: int = 0
    computed_tokens: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    generated_tokens: int = 0


COUNTS = ("steps", "computed_tokens", "reused_tokens", "preemptions", "generated_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """News of one choice of a call. Its text is :func:`chunk_text` of ``context_ids``, ``token_ids`` and ``trim``.

    ``token_ids`` are new ones, ``logprobs`` theirs if they were wanted. ``finish_reason`` (``stop``, ``length``, ``cancelled``)
    is in a choice's last event. ``final`` is the call's last one, with the seconds from its arrival to its first token and to its
    end. An event with ``error``, one sentence, and its ``code`` is always final.
    """

    id: int
    choice: int = 0
    token_ids: tuple[int, ...] = ()
    context_ids: tuple[int, ...] = ()
    trim: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    final: bool = False
    first_token_s: float | None = None
    total_s: float | None = None
    error: str | None = None
    code: str | None = None


def failure(call: int, code: str, message: str) -> Event:
    """The event that ends a call without success."""
    return Event(id=call, final=True, error=message, code=code)


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def request_message(call: int, body: Mapping[str, Any], end_ids: list[int] | None) -> dict[str, Any]:
    """A call for rank 0."""
    return {"type": REQUEST, "id": call, "body": body, "end_ids": end_ids}


def cancel_message(call: int) -> dict[str, Any]:
    """Rank 0 shall end a call with what there is."""
    return {"type": CANCEL, "id": call}


def ready_message(limits: Limits) -> dict[str, Any]:
    """Calls are welcome."""
    return {"type": READY, **asdict(limits)}


def step_message(events: list[Event], stats: RankStats) -> dict[str, Any]:
    """What came of a step."""
    return {"type": STEP, "events": [event_json(event) for event in events], "stats": asdict(stats)}


def decode_limits(message: Mapping[str, Any]) -> Limits:
    """Of a ``ready``."""
    return Limits(**{field.name: message[field.name] for field in fields(Limits)})


def decode_step(message: Mapping[str, Any]) -> tuple[list[Event], RankStats]:
    """Of a ``step``."""
    return [event_of(value) for value in message["events"]], RankStats(**message["stats"])


def event_json(event: Event) -> dict[str, Any]:
    """Only what is not the default, since most events are one token."""
    value = {field.name: found for field in fields(Event) if (found := getattr(event, field.name)) != field.default}
    if event.logprobs is not None:
        value["logprobs"] = [(each.token, each.logprob, each.top) for each in event.logprobs]
    return value


def event_of(value: Mapping[str, Any]) -> Event:
    """Of :func:`event_json`."""
    known = dict(value)
    for name in ("token_ids", "context_ids"):
        known[name] = tuple(known.get(name, ()))
    if known.get("logprobs") is not None:
        known["logprobs"] = tuple(
            TokenLogprobs(token, logprob, tuple((other, its) for other, its in top)) for token, logprob, top in known["logprobs"]
        )
    return Event(**known)
