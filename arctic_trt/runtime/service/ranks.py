"""The ranks of an engine that serves: rank 0 takes calls from the leader's socket between any two steps, the others follow."""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.launch import is_leader
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.batcher import Batcher
from arctic_trt.runtime.device import AUTO
from arctic_trt.runtime.jobs.lines import LineError, parse_line
from arctic_trt.runtime.jobs.plan import Defaults, Planner, in_fields
from arctic_trt.runtime.kv_budget import KvBudget
from arctic_trt.runtime.open_engine import OpenEngine, check_engine, open_engine
from arctic_trt.runtime.requests import find_end_ids
from arctic_trt.runtime.runner import detokenizer_of, tokenizer_directory
from arctic_trt.runtime.service.answers import Answers, Call
from arctic_trt.runtime.service.protocol import (
    CANCEL,
    INTERNAL,
    INVALID,
    Limits,
    RankStats,
    encode,
    ready_message,
    step_message,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceOptions:
    """What the ranks of a group are started with; ``socket`` is where the leader listens."""

    engine_dir: Path
    socket: Path
    tokenizer_dir: Path | None = None
    kv_budget: KvBudget = field(default_factory=KvBudget)
    device: str = AUTO


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A call that cannot be planned."""

    id: int
    message: str
    code: str = INVALID


@dataclass(frozen=True, slots=True)
class _Cancel:
    """A call that nobody waits for any more."""

    id: int


Inbox = queue.SimpleQueue[Call | _Refusal | _Cancel | None]


def run_service(options: ServiceOptions) -> None:
    """Serve until the leader closes its socket; all ranks call it.

    Raises what :func:`open_engine` does, :class:`UsageError` for a tokenizer that cannot be read, :class:`RefusedError` when
    nobody listens.
    """
    check_engine(options.engine_dir)
    if not is_leader():
        open_engine(options.engine_dir, options.kv_budget, options.device).follow()
        return
    with _connect(options.socket) as leader:
        directory = tokenizer_directory(options.engine_dir, options.tokenizer_dir)
        tokenizer = Tokenizer(directory)
        engine = open_engine(options.engine_dir, options.kv_budget, options.device)
        defaults = Defaults(end_ids=find_end_ids(None, tokenizer, directory))
        planner = Planner(limits=engine.limits, vocab_size=engine.vocab_size, tokenizer=tokenizer, defaults=defaults)
        serve(engine, leader, planner, tokenizer)
        engine.close()


def _connect(path: Path) -> socket.socket:
    leader = socket.socket(socket.AF_UNIX)
    try:
        leader.connect(str(path))
    except OSError as error:
        leader.close()
        raise RefusedError(f"Nobody listens at --socket {path} ({error.strerror}).", "arctic-trt triton starts this.") from None
    return leader


def serve(engine: OpenEngine, leader: socket.socket, planner: Planner, tokenizer: Tokenizer) -> None:
    """On rank 0: compute what comes through ``leader``, as it comes; asleep while there is nothing to do."""
    inbox: Inbox = queue.SimpleQueue()
    answers = Answers(tokenizer.decode)
    threading.Thread(target=_read, args=(leader, planner, inbox), name="calls", daemon=True).start()
    with engine.batcher(detokenizer=detokenizer_of(tokenizer), listeners=answers.listeners) as batcher:
        there = _say(leader, ready_message(_limits(engine))) and _report(leader, batcher, answers)
        while there and _take_in(inbox, batcher, answers):
            batcher.step()
            _drop_broken(batcher, answers)
            there = _report(leader, batcher, answers)


def _report(leader: socket.socket, batcher: Batcher, answers: Answers) -> bool:
    """Send what came of a step; returns whether the leader is still there."""
    stats = RankStats(**asdict(batcher.stats), generated_tokens=answers.generated_tokens)
    return _say(leader, step_message(answers.take(), stats))


def _say(leader: socket.socket, message: Mapping[str, Any]) -> bool:
    try:
        leader.sendall(encode(message))
    except ConnectionError as error:
        logger.debug("The leader's socket broke: %s", error)
        return False
    return True


def _limits(engine: OpenEngine) -> Limits:
    limits = engine.limits
    return Limits(
        max_input_len=limits.max_input_len,
        max_seq_len=limits.max_seq_len,
        max_batch_size=limits.max_batch_size,
        vocab_size=engine.vocab_size,
        world_size=engine.world_size,
    )


def _read(leader: socket.socket, planner: Planner, inbox: Inbox) -> None:
    """In a thread of its own: what the leader says, planned, so that checking a call keeps no step waiting."""
    try:
        with leader.makefile("rb") as lines:
            for line in lines:
                inbox.put(_plan_safely(json.loads(line), planner))
    except OSError as error:
        logger.debug("The leader's socket broke: %s", error)
    finally:
        inbox.put(None)


def _plan_safely(message: Mapping[str, Any], planner: Planner) -> Call | _Refusal | _Cancel:
    """What fails for one call in a way that nobody thought of must not end the others."""
    try:
        return plan_message(message, planner)
    except Exception as error:
        logger.exception("Request %s cannot be planned.", message["id"])
        return _Refusal(int(message["id"]), f"The request cannot be planned ({type(error).__name__}: {error}).", INTERNAL)


def plan_message(message: Mapping[str, Any], planner: Planner) -> Call | _Refusal | _Cancel:
    """What to do about a message; without ``end_ids`` a call ends at those of the tokenizer."""
    call = int(message["id"])
    if message["type"] == CANCEL:
        return _Cancel(call)
    body = dict(message["body"])
    stream = body.pop("stream", True)
    if not isinstance(stream, bool):
        return _Refusal(call, f"stream {stream!r} is not valid, expected true or false.")
    try:
        requests = planner.requests(parse_line(body, call))
    except LineError as error:
        return _Refusal(call, error.message)
    if message.get("end_ids") is not None:
        requests = [replace(request, end_ids=frozenset(message["end_ids"])) for request in requests]
    return Call(id=call, requests=requests, stream=stream)


def _take_in(inbox: Inbox, batcher: Batcher, answers: Answers) -> bool:
    """Let in what has come, waiting for something where there is nothing to do; returns whether the leader is still there."""
    wait = batcher.idle
    while wait or not inbox.empty():
        wait = False
        news = inbox.get()
        if news is None:
            return False
        if isinstance(news, _Refusal):
            answers.fail(news.id, news.code, news.message)
        elif isinstance(news, _Cancel):
            for index in answers.indices(news.id):
                batcher.cancel(index)
        else:
            _add(news, batcher, answers)
    return True


def _add(call: Call, batcher: Batcher, answers: Answers) -> None:
    try:
        for request in call.requests:
            batcher.add(request, text=call.needs_text)
    except UsageError as error:  # what the cache can never hold; so it is for the first choice if for any
        answers.fail(call.id, INVALID, in_fields(str(error)))
        return
    answers.begin(call)


def _drop_broken(batcher: Batcher, answers: Answers) -> None:
    """End the calls of which a choice could not go on."""
    broken, answers.broken = answers.broken, []
    for call, error in broken:
        others = answers.indices(call)
        answers.fail(call, INVALID if isinstance(error, UsageError) else INTERNAL, in_fields(str(error)))
        for index in others:
            batcher.cancel(index)
