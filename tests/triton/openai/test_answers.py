"""Answers whole and in events: the same text, tokens and log probabilities, however they are cut."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.triton.openai.answers import DONE, Answer
from arctic_trt.triton.openai.bodies import parse_chat, parse_completion
from arctic_trt.triton.openai.engine import Chunk
from tests.support.scripted_engine import scored

HELLO = [{"role": "user", "content": "hello"}]


def answer(chat: bool, prompts: int = 1, **body: Any) -> Answer:
    prompt: dict[str, Any] = {"messages": HELLO} if chat else {"prompt": ["a"] * prompts}
    ask = (parse_chat if chat else parse_completion)(json.dumps({**prompt, **body}).encode())
    return Answer(ask, name="id-1", created=7, model="arctic")


def chunk(text: str, **more: Any) -> Chunk:
    return Chunk(text=text, **{"num_tokens": 1, "prompt_tokens": 5, **more})


def decoded(data: list[bytes]) -> list[dict[str, Any]]:
    return [json.loads(each.removeprefix(b"data: ")) for each in data if each != DONE]


def test_a_whole_chat() -> None:
    whole = answer(True)
    whole.add(0, chunk("Hi.", num_tokens=2, finish_reason="stop"))
    assert whole.complete
    assert whole.whole() == {
        **{"id": "id-1", "object": "chat.completion", "created": 7, "model": "arctic"},
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }


def test_choices_of_several_prompts_stand_in_order_and_each_prompt_counts_once() -> None:
    whole = answer(False, prompts=2, n=2)
    for prompt, choice in ((1, 1), (0, 0), (1, 0), (0, 1)):
        assert not whole.complete
        whole.add(prompt, chunk(f"{prompt}{choice}", choice=choice, finish_reason="length"))
    assert [(each["index"], each["text"]) for each in whole.whole()["choices"]] == [(0, "00"), (1, "01"), (2, "10"), (3, "11")]
    assert whole.usage == {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}


def test_the_events_of_a_chat() -> None:
    stream = answer(True, stream=True)
    events = decoded([*stream.events(0, chunk("Hi")), *stream.events(0, chunk(".", finish_reason="stop")), *stream.last_events()])
    assert {(each["id"], each["object"]) for each in events} == {("id-1", "chat.completion.chunk")}
    choices = [each["choices"][0] for each in events]
    assert [(each["delta"], each["finish_reason"]) for each in choices] == [
        ({"role": "assistant", "content": "", "refusal": None}, None),
        ({"content": "Hi"}, None),
        ({"content": "."}, None),
        ({}, "stop"),
    ]
    assert stream.complete and not any("usage" in each for each in events)


def test_usage_at_the_end_is_an_event_without_choices_and_null_before_it() -> None:
    stream = answer(False, stream=True, stream_options={"include_usage": True})
    data = [*stream.events(0, chunk("Hi.", finish_reason="stop")), *stream.last_events()]
    first, last = decoded(data)
    assert first["usage"] is None
    assert last["choices"] == [] and last["usage"] == {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    assert data[-1] == DONE


def test_usage_so_far_comes_with_every_event() -> None:
    stream = answer(False, stream=True, stream_options={"continuous_usage_stats": True})
    events = decoded([*stream.events(0, chunk("a", num_tokens=2)), *stream.events(0, chunk("b", finish_reason="stop"))])
    assert [each["usage"]["completion_tokens"] for each in events] == [2, 3]


def test_a_piece_of_a_line_is_one_event_whatever_is_in_it() -> None:
    text = "one\r\n\ntwo\u2028 \U0001f600 data: x\n\n"
    (data,) = answer(False, stream=True).events(0, chunk(text))
    assert data.count(b"\n") == 2 and data.endswith(b"\n\n") and b"\r" not in data
    assert decoded([data])[0]["choices"][0]["text"] == text


pieces = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=8)


@given(pieces, st.booleans(), st.integers(0, 3), st.data())
def test_events_add_up_to_the_whole(texts: list[str], chat: bool, alternatives: int, data: st.DataObject) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": alternatives} if chat else {"logprobs": alternatives}
    groups, rest = [], texts
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        groups.append(rest[:size])
        rest = rest[size:]
    chunks = [
        Chunk(
            text="".join(group),
            num_tokens=len(group),
            prompt_tokens=5,
            finish_reason="stop" if group is groups[-1] else None,
            logprobs=tuple(scored(text, alternatives) for text in group),
        )
        for group in groups
    ]
    whole, stream = answer(chat, **asked), answer(chat, stream=True, **asked)
    events: list[dict[str, Any]] = []
    for each in chunks:
        whole.add(0, each)
        events += decoded(list(stream.events(0, each)))
    expected = whole.whole()["choices"][0]
    choices = [each["choices"][0] for each in events]
    logprobs = [each["logprobs"] for each in choices if each["logprobs"]]
    if chat:
        assert "".join(each["delta"].get("content", "") for each in choices) == expected["message"]["content"]
        assert [item for each in logprobs for item in each["content"]] == expected["logprobs"]["content"]
    else:
        assert "".join(each["text"] for each in choices) == expected["text"]
        for name, values in expected["logprobs"].items():
            assert [item for each in logprobs for item in each[name]] == values
    assert stream.usage == whole.usage and stream.complete and whole.complete
