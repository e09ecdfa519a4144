"""What is said is what is heard."""

from __future__ import annotations

import json
from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.scheduler import Stats
from arctic_trt.runtime.service.protocol import (
    COUNTS,
    INVALID,
    Event,
    Limits,
    RankStats,
    cancel_message,
    decode_limits,
    decode_step,
    encode,
    failure,
    ready_message,
    request_message,
    step_message,
)

ids = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
seconds = st.none() | st.floats(0, 1e6)
finite = st.floats(-1e4, 0)
logprobs = st.builds(
    TokenLogprobs, token=st.integers(0, 999), logprob=finite, top=st.lists(st.tuples(st.integers(0, 9), finite)).map(tuple)
)
events = st.builds(
    Event,
    id=st.integers(1),
    choice=st.integers(0, 127),
    token_ids=ids,
    context_ids=ids,
    trim=st.integers(0, 99),
    logprobs=st.none() | st.lists(logprobs).map(tuple),
    finish_reason=st.sampled_from([None, "stop", "length", "cancelled"]),
    prompt_tokens=st.integers(0),
    final=st.booleans(),
    first_token_s=seconds,
    total_s=seconds,
    error=st.none() | st.text(),
    code=st.sampled_from([None, "invalid", "internal"]),
)


@given(st.lists(events), st.builds(RankStats, **{field.name: st.integers(0) for field in fields(RankStats)}))
def test_steps_arrive_as_they_were_sent(sent: list[Event], stats: RankStats) -> None:
    line = encode(step_message(sent, stats))
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode_step(json.loads(line)) == (sent, stats)


def test_limits_arrive_as_they_were_sent() -> None:
    limits = Limits(max_input_len=1, max_seq_len=2, max_batch_size=3, vocab_size=4, world_size=5)
    message = json.loads(encode(ready_message(limits)))
    assert message["type"] == "ready" and decode_limits(message) == limits


def test_an_event_is_as_short_as_it_can_be() -> None:
    assert step_message([Event(id=3, token_ids=(7,))], RankStats())["events"] == [{"id": 3, "token_ids": (7,)}]


def test_what_a_leader_says() -> None:
    assert request_message(3, {"prompt": [1]}, [2]) == {"type": "request", "id": 3, "body": {"prompt": [1]}, "end_ids": [2]}
    assert cancel_message(3) == {"type": "cancel", "id": 3}
    assert failure(3, INVALID, "No.") == Event(id=3, final=True, error="No.", code="invalid")


def test_the_schedulers_figures_are_all_passed_on() -> None:
    names = {field.name for field in fields(RankStats)}
    assert {field.name for field in fields(Stats)} | {"generated_tokens"} == names >= set(COUNTS)
