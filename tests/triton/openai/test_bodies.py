"""Requests as clients send them: every parameter arrives, and what cannot be done is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.triton.openai.bodies import Ask, parse_chat, parse_completion
from arctic_trt.triton.openai.errors import ApiError

HELLO = [{"role": "user", "content": "hello"}]


def chat(**body: Any) -> Ask:
    return parse_chat(json.dumps({"model": "arctic", "messages": HELLO, **body}).encode())


def completion(**body: Any) -> Ask:
    return parse_completion(json.dumps({"model": "arctic", "prompt": "hello", **body}).encode())


def complaint(parse: Any, **body: Any) -> str:
    with pytest.raises(ApiError) as caught:
        parse(**body)
    assert caught.value.status == 400
    return caught.value.message


def test_a_chat_in_the_engine_s_fields() -> None:
    ask = chat(max_completion_tokens=7, temperature=1, top_p=0.5, seed=3, stop="\n", n=2, logprobs=True, top_logprobs=4)
    assert (ask.chat, ask.model, ask.n, ask.stream) == (True, "arctic", 2, False)
    assert ask.prompts == (
        {
            "messages": HELLO,
            **{"max_tokens": 7, "temperature": 1.0, "top_p": 0.5, "seed": 3, "stop": ["\n"], "n": 2, "logprobs": 4},
            "stream": False,
        },
    )


def test_what_is_not_given_is_left_to_the_engine() -> None:
    assert completion().prompts == ({"prompt": "hello", "n": 1, "stream": False},)


def test_parameters_beyond_openai_s() -> None:
    (fields,) = completion(top_k=5, min_p=0.1, repetition_penalty=1.1, bad_words=["no", ""], ignore_eos=True).prompts
    assert fields["top_k"] == 5 and fields["bad_words"] == ["no"] and fields["ignore_eos"] is True
    assert (fields["min_p"], fields["repetition_penalty"]) == (0.1, 1.1)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_all_four_forms_of_a_prompt(prompt: Any, prompts: list[Any]) -> None:
    assert [fields["prompt"] for fields in completion(prompt=prompt).prompts] == prompts


def test_streams() -> None:
    ask = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert ask.stream and ask.usage_at_end and ask.usage_so_far and ask.prompts[0]["stream"] is True


def test_null_is_the_same_as_absent_also_in_the_answers_of_earlier_turns() -> None:
    answer = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    ask = chat(messages=[*HELLO, answer], stop=None, logit_bias=None, n=None, made_up=None)
    assert ask.prompts[0]["messages"] == [*HELLO, {"role": "assistant", "content": "hi"}]


def test_a_developer_speaks_for_the_system_and_parts_of_text_are_put_together() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (fields,) = chat(messages=[{"role": "developer", "content": parts}]).prompts
    assert fields["messages"] == [{"role": "system", "content": "ab"}]


def test_values_that_change_nothing_are_taken() -> None:
    same = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "logit_bias": {}, "store": False}
    assert chat(**same, user="u", metadata={"a": "b"}, service_tier="auto").prompts == chat().prompts
    assert completion(echo=False, best_of=2, n=2).prompts == completion(n=2).prompts


@pytest.mark.parametrize(
    ("parse", "body", "expected"),
    [
        (chat, {"maxtokens": 1}, "The parameter 'maxtokens' is not known."),
        (chat, {"messages": [{"role": "user", "content": "a", "name": "b"}]}, "The parameter 'name' is not known."),
        (chat, {"messages": []}, "messages [] is not valid"),
        (chat, {"messages": [{"role": "user"}]}, "messages.0.content is missing."),
        (chat, {"messages": "hello"}, "messages 'hello' is not valid"),
        (chat, {"stream": "yes"}, "stream 'yes' is not valid, expected true or false."),
        (chat, {"stream_options": {"include_usage": True}}, "stream_options goes with stream true."),
        (chat, {"top_logprobs": 2}, "top_logprobs goes with logprobs true."),
        (chat, {"n": 0}, "n 0 is not valid"),
        (chat, {"n": 129}, "n 129 is not valid"),
        (chat, {"tools": [{"type": "function"}]}, "expected an empty list: tools are not offered."),
        (
            chat,
            {"response_format": {"type": "json_object"}},
            "response_format.type 'json_object' is not valid, expected 'text', the only one that is offered.",
        ),
        (chat, {"logit_bias": {"5": 1.0}}, "expected no entries: it is not offered."),
        (chat, {"temperature": "hot"}, "temperature 'hot' is not valid"),
        (chat, {"max_tokens": 0}, "max_tokens 0 is not valid"),
        (completion, {"prompt": ""}, "prompt is empty"),
        (completion, {"prompt": []}, "prompt is empty"),
        (completion, {"prompt": 5}, "prompt 5 is not valid, expected a text, token ids, or a list of either."),
        (completion, {"prompt": ["a", 5]}, "expected a text, token ids, or a list of either."),
        (completion, {"prompt": ["a"] * 65, "n": 2}, "65 prompts with n 2 exceed 128 choices."),
        (completion, {"echo": True}, "expected false, the only value that is offered."),
        (completion, {"best_of": 3}, "best_of is not n"),
        (completion, {"suffix": "x"}, "The parameter 'suffix' is not known."),
        (completion, {"messages": HELLO}, "The parameter 'messages' is not known."),
    ],
)
def test_refusals_name_what_is_wrong(parse: Any, body: dict[str, Any], expected: str) -> None:
    assert expected in complaint(parse, **body)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "The request's body is not JSON: Expecting value"),
        (b"{", "The request's body is not JSON"),
        (b"[]", "The request's body is a list, expected a JSON object."),
        (b'{"messages": "\xff"}', "The request's body is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "The request's body holds half a character, '\\ud83d'."),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature nan is not valid"),
        (b"[" * 100_000, "The request's body is not JSON"),
        (b"{}", "messages is missing."),
    ],
)
def test_bodies_that_are_none(data: bytes, expected: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(data)
    assert caught.value.status == 400 and caught.value.message.startswith(expected)


def test_an_error_names_its_field() -> None:
    with pytest.raises(ApiError) as caught:
        chat(top_p="x")
    assert caught.value.body["error"]["param"] == "top_p"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
fields = st.sampled_from([*("messages", "prompt", "stream", "stream_options", "stop", "n", "logprobs", "tools", "best_of", "x")])


@given(st.dictionaries(fields, json_values, max_size=5), st.sampled_from([parse_chat, parse_completion]))
def test_whatever_comes_is_either_taken_or_refused(body: dict[str, Any], parse: Any) -> None:
    try:
        assert parse(json.dumps(body).encode()).prompts
    except ApiError as error:
        assert error.status == 400 and error.message.endswith(".")
