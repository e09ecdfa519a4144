"""Rank 0 at its socket: answers equal to those of single requests, calls that come and go, and who is refused."""

from __future__ import annotations

import json
import queue
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import RefusedError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.jobs.plan import Defaults, Planner
from arctic_trt.runtime.kv_budget import KvBudget
from arctic_trt.runtime.open_engine import OpenEngine, open_engine
from arctic_trt.runtime.service import ranks
from arctic_trt.runtime.service.protocol import Event, cancel_message, decode_limits, decode_step, encode, request_message
from arctic_trt.runtime.service.ranks import ServiceOptions, plan_message, run_service, serve
from arctic_trt.runtime.service.text import chunk_text
from arctic_trt.runtime.worker import Worker
from tests.runtime.conftest import Model
from tests.support.engines import build_engine, complete


@pytest.fixture(scope="module")
def engine(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> OpenEngine:
    """For two sequences at a time, with a cache for little more."""
    engine_dir = build_engine(tiny.checkpoint("fp8"), tmp_path_factory.mktemp("service") / "engine", max_batch_size=2)
    return open_engine(engine_dir, KvBudget(max_tokens=160))


@pytest.fixture(scope="module")
def tokenizer(tiny: Model) -> Tokenizer:
    return Tokenizer(tiny.hf_dir)


@pytest.fixture(scope="module")
def planner(engine: OpenEngine, tokenizer: Tokenizer) -> Planner:
    return Planner(limits=engine.limits, vocab_size=engine.vocab_size, tokenizer=tokenizer, defaults=Defaults(end_ids=(4,)))


class Leader:
    """The other end of rank 0's socket, which runs in a thread."""

    def __init__(self, engine: OpenEngine, planner: Planner, tokenizer: Tokenizer) -> None:
        self.sock, theirs = socket.socketpair()
        self.lines = self.sock.makefile("rb")
        self.steps: list[tuple[list[Event], Any]] = []
        self.thread = threading.Thread(target=self._serve, args=(engine, theirs, planner, tokenizer))
        self.thread.start()
        self.limits = decode_limits(json.loads(self.lines.readline()))

    def _serve(self, engine: OpenEngine, theirs: socket.socket, planner: Planner, tokenizer: Tokenizer) -> None:
        with theirs:
            serve(engine, theirs, planner, tokenizer)

    def ask(self, call: int, end_ids: list[int] | None = None, **body: Any) -> None:
        self.sock.sendall(encode(request_message(call, {"max_tokens": 8, **body}, [] if end_ids is None else end_ids)))

    def cancel(self, call: int) -> None:
        self.sock.sendall(encode(cancel_message(call)))

    def step(self) -> list[Event]:
        events, stats = decode_step(json.loads(self.lines.readline()))
        self.steps.append((events, stats))
        return events

    def events(self, *calls: int) -> dict[int, list[Event]]:
        """What becomes of calls, up to their ends."""
        found: dict[int, list[Event]] = {call: [] for call in calls}
        while not all(events and events[-1].final for events in found.values()):
            for event in self.step():
                found[event.id].append(event)
        return found

    def error(self, call: int) -> tuple[str | None, str | None]:
        (event,) = self.events(call)[call]
        assert event.final
        return event.code, event.error


@pytest.fixture
def leader(engine: OpenEngine, planner: Planner, tokenizer: Tokenizer) -> Iterator[Leader]:
    leader = Leader(engine, planner, tokenizer)
    yield leader
    leader.sock.shutdown(socket.SHUT_RDWR)
    leader.thread.join(10)
    assert not leader.thread.is_alive(), "rank 0 leaves when the leader does"
    leader.lines.close()
    leader.sock.close()


def mixed(count: int, tiny: Model) -> list[dict[str, Any]]:
    """Bodies of all kinds."""
    draw = random.Random(3)
    kinds: list[dict[str, Any]] = [
        {},
        {"stream": False},
        {"temperature": 1.0, "top_k": 30, "seed": 11},
        {"temperature": 0.7, "top_p": 0.9, "seed": 2**64 - 1, "n": 3},
        {"stop": ["th", "e "], "repetition_penalty": 1.3},
        {"stop": "a", "stream": False, "frequency_penalty": 1.0},
        {"logprobs": 3, "min_p": 0.2, "seed": 5},
        {"bad_words": ["the", "a"], "presence_penalty": 1.0},
    ]
    prompts = tiny.prompts(*[draw.randrange(1, 60) for _ in range(count)], seed=9)
    return [{"prompt": prompt, "max_tokens": draw.randrange(1, 24), **kinds[i % len(kinds)]} for i, prompt in enumerate(prompts)]


def by_choice(events: list[Event], tokenizer: Tokenizer) -> dict[int, tuple[list[int], str, Any, Any]]:
    """Tokens, text, how it ended and log probabilities of each choice."""
    found: dict[int, tuple[list[int], str, Any, Any]] = {}
    for event in events:
        tokens, text, _, logprobs = found.get(event.choice, ([], "", None, ()))
        new = chunk_text(tokenizer.decode, event.context_ids, event.token_ids, event.trim)
        found[event.choice] = (
            [*tokens, *event.token_ids],
            text + new,
            event.finish_reason,
            (*logprobs, *(event.logprobs or ())),
        )
    return found


def test_64_mixed_calls_together_are_answered_as_each_alone(leader: Leader, tiny: Model, tokenizer: Tokenizer) -> None:
    assert (leader.limits.max_batch_size, leader.limits.vocab_size, leader.limits.world_size) == (2, 512, 1)
    bodies = mixed(64, tiny)
    alone = {}
    for call, body in enumerate(bodies, 1):
        leader.ask(call, **body)
        alone[call] = leader.events(call)[call]
    calls = range(101, 165)
    for call, body in zip(calls, bodies, strict=True):
        leader.ask(call, **body)
    together = leader.events(*calls)
    for call, body in enumerate(bodies, 1):
        answer = by_choice(together[call + 100], tokenizer)
        assert answer == by_choice(alone[call], tokenizer) and len(answer) == body.get("n", 1)
        assert body.get("stream", True) or len(together[call + 100]) == 1
    last = leader.steps[-1][1]
    assert last.waiting == last.active == last.blocks_in_use == 0
    assert max(stats.batch_size for _, stats in leader.steps) == 2 and max(stats.waiting for _, stats in leader.steps) > 30


def test_answers_are_those_of_a_plain_run(leader: Leader, tiny: Model, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompts = tiny.prompts(9, 30, 2)
    plain, _ = complete(tiny.engine("fp8"), prompts, tmp_path, max_output_len=12, stop_words=("th",), tokenizer_dir=tiny.hf_dir)
    for call, (prompt, output) in enumerate(zip(prompts, plain.outputs, strict=True), 1):
        leader.ask(call, prompt=prompt, max_tokens=12, stop="th", end_ids=[4, 300, 2])
        ((tokens, text, reason, _),) = by_choice(leader.events(call)[call], tokenizer).values()
        assert (tokens, text, reason) == (output.token_ids, output.text, output.finish_reason)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take so long that a call cannot end before anything can be said about it."""
    execute = Worker.execute
    monkeypatch.setattr(Worker, "execute", lambda self, step: (time.sleep(0.005), execute(self, step))[1])


@pytest.mark.usefixtures("slow")
def test_a_cancelled_call_makes_room_within_a_step(leader: Leader) -> None:
    for call in (1, 2, 3):
        leader.ask(call, prompt=[5 + call], max_tokens=90)
    while not leader.steps or (leader.steps[-1][1].waiting, leader.steps[-1][1].active) != (1, 2):
        leader.step()
    leader.cancel(1)
    while not any(event.id == 1 and event.final for event in leader.step()):
        pass
    events, stats = leader.steps[-1]
    (end,) = [event for event in events if event.id == 1]
    assert end.finish_reason == "cancelled" and end.error is None
    assert stats.batch_size == 2 and stats.active == 2 and stats.waiting == 0, "the next one has its place in this very step"
    leader.cancel(1)
    leader.cancel(99)
    leader.cancel(2)
    leader.cancel(3)
    assert {call: found[-1].finish_reason for call, found in leader.events(2, 3).items()} == {2: "cancelled", 3: "cancelled"}
    assert leader.steps[-1][1].blocks_in_use == 0


@pytest.mark.usefixtures("slow")
def test_a_call_that_waits_can_be_cancelled_before_it_begins(leader: Leader) -> None:
    for call in (1, 2, 3):
        leader.ask(call, prompt=[9], max_tokens=60)
    leader.cancel(3)
    found = leader.events(1, 2, 3)
    assert [(event.token_ids, event.finish_reason) for event in found[3]] == [((), "cancelled")]
    assert found[1][-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"prompt": []}, "The prompt is empty. Give it at least one token."),
        ({"prompt": [512]}, "The prompt has token id 512, expected 0 to 511. Is the tokenizer another model's?"),
        ({"prompt": [5] * 300}, "The prompt has 300 tokens, the engine was built for --max_input_len 256."),
        ({"prompt": [5] * 250}, "The prompt has 250 tokens, which with max_tokens 8 exceeds the engine's --max_seq_len 256."),
        (
            {"prompt": [5] * 150, "max_tokens": 90},
            "The prompt has 150 tokens, which with 90 of output exceeds the KV cache of 160",
        ),
        ({"prompt": [5], "temperature": -1.0}, "temperature -1.0 is out of range, expected a finite number, 0 or more."),
        ({"prompt": [5], "colour": "red"}, "The parameter 'colour' is not known."),
        ({"prompt": [5], "stream": 1}, "stream 1 is not valid, expected true or false."),
        ({"prompt": "a\ud800"}, "The line holds half a character"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(leader: Leader, body: dict[str, Any], complaint: str) -> None:
    leader.ask(1, **body)
    code, error = leader.error(1)
    assert code == "invalid" and error and error.startswith(complaint)
    leader.ask(2, prompt=[5])
    assert leader.events(2)[2][-1].finish_reason == "length"


def test_bad_words_that_leave_nothing_fail_one_call_alone(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = tuple((token,) for token in range(512))
    monkeypatch.setattr("arctic_trt.runtime.jobs.plan.word_ids", lambda words, tokenizer: everything if words else ())
    leader.ask(1, prompt=[7], max_tokens=20)
    leader.ask(2, prompt=[8], bad_words=["all"], n=2, temperature=1.0)
    found = leader.events(1, 2)
    assert [event.error for event in found[2]] == ["The bad words of the prompt leave no token after 1. Forbid fewer words."]
    assert found[2][0].code == "invalid" and found[1][-1].finish_reason == "length"
    assert leader.steps[-1][1].blocks_in_use == 0


def test_logits_that_are_not_finite_fail_one_call_alone(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = Worker.execute

    def poisoned(self: Worker, step: Any) -> Any:
        outcome = execute(self, step)
        for row, chunk in enumerate(step.chunks):
            if chunk.tokens[-1] == 500:
                outcome.logits()[row, 3] = float("inf")
        return outcome

    monkeypatch.setattr(Worker, "execute", poisoned)
    leader.ask(1, prompt=[7], max_tokens=20)
    leader.ask(2, prompt=[6, 500])
    found = leader.events(1, 2)
    assert found[2][-1].code == "internal" and "logits of the prompt at position 1 are not finite" in str(found[2][-1].error)
    assert found[1][-1].finish_reason == "length"


def test_what_nobody_thought_of_fails_one_call_alone(leader: Leader, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_message
    wrong = {"type": "request", "id": 1, "body": {"prompt": [7]}, "end_ids": 7}
    leader.sock.sendall(encode(wrong))
    code, error = leader.error(1)
    assert code == "internal" and error and error.startswith("The request cannot be planned (TypeError:")
    assert ranks.plan_message is plan
    leader.ask(2, prompt=[5])
    assert leader.events(2)[2][-1].final


def test_a_call_ends_at_its_own_end_ids_or_the_tokenizers(planner: Planner) -> None:
    body = {"prompt": [5], "stream": False, "n": 2, "temperature": 1.0}
    asked = plan_message(request_message(3, body, [9, 8]), planner)
    usual = plan_message(request_message(3, body, None), planner)
    never = plan_message(request_message(3, body, []), planner)
    ends = [[request.end_ids for request in call.requests] for call in (asked, usual, never)]  # type: ignore[union-attr]
    assert ends == [[frozenset({8, 9})] * 2, [frozenset({4})] * 2, [frozenset()] * 2]
    assert body["stream"] is False, "the message is left as it is"


def test_a_text_and_a_chat_can_be_asked_too(leader: Leader) -> None:
    leader.ask(1, prompt="the a", max_tokens=2)
    leader.ask(2, messages=[{"role": "user", "content": "the"}], max_tokens=2)
    found = leader.events(1, 2)
    assert found[1][-1].prompt_tokens == 3 and found[2][-1].prompt_tokens > 5


def test_the_leader_may_go_at_any_time(engine: OpenEngine, planner: Planner, tokenizer: Tokenizer) -> None:
    leader = Leader(engine, planner, tokenizer)
    leader.ask(1, prompt=[7], max_tokens=150)
    leader.step()
    leader.lines.close()
    leader.sock.close()
    leader.thread.join(10)
    assert not leader.thread.is_alive()
    assert not engine._backend.worker._cache.tables


def test_without_a_leader_nothing_is_loaded(tiny: Model, tmp_path: Path) -> None:
    options = ServiceOptions(engine_dir=tiny.engine("fp8"), socket=tmp_path / "none", tokenizer_dir=tiny.hf_dir)
    with pytest.raises(RefusedError, match=r"Nobody listens at --socket .*none \(No such file or directory\)"):
        run_service(options)


def test_the_whole_of_rank_0(tiny: Model, tmp_path: Path) -> None:
    heard: queue.Queue[bytes] = queue.Queue()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(1)

    def lead() -> None:
        leader, _ = listener.accept()
        with leader, leader.makefile("rb") as lines:
            heard.put(lines.readline())
            leader.shutdown(socket.SHUT_WR)
            heard.put(lines.read())

    thread = threading.Thread(target=lead)
    thread.start()
    run_service(ServiceOptions(engine_dir=tiny.engine("fp8"), socket=tmp_path / "s", tokenizer_dir=tiny.hf_dir))
    thread.join(10)
    listener.close()
    assert json.loads(heard.get())["type"] == "ready"
    assert json.loads(heard.get().splitlines()[0])["events"] == []
