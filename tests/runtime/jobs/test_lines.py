"""Lines of a batch job: both forms, every wrong kind named, nothing ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_trt.runtime.jobs.lines import LineError, custom_id_of, decode_line, parse_line, texts


def complaint(value: dict[str, Any]) -> str:
    with pytest.raises(LineError) as caught:
        parse_line(value, 7)
    assert caught.value.code == "invalid_request"
    return caught.value.message


def chat(**body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages, **body}}


def test_the_flat_form() -> None:
    value = {"custom_id": "a", "prompt": "text", "max_tokens": 20, "temperature": 1, "top_p": 0.5, "top_k": 3, "seed": 4}
    line = parse_line(value, 7)
    assert (line.number, line.custom_id, line.chat, line.max_tokens) == (7, "a", False, 20)
    assert line.prompt.text == "text"
    assert line.sampling == {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "seed": 4}


def test_token_ids_and_messages() -> None:
    assert parse_line({"prompt": [1, 2]}, 1).prompt.token_ids == (1, 2)
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    line = parse_line({"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": parts}]}, 1)
    assert line.chat and line.prompt.messages == ({"role": "system", "content": "a"}, {"role": "user", "content": "bc"})


def test_openai_s_form() -> None:
    line = parse_line(chat(max_completion_tokens=5, n=3, model="m", user="u", metadata={"k": 1}, stream=False), 2)
    assert (line.custom_id, line.chat, line.max_tokens, line.body.n, line.body.model) == ("c", True, 5, 3, "m")
    assert parse_line({"custom_id": "d", "url": "/v1/completions", "body": {"prompt": "x"}}, 2).prompt.text == "x"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 4}, 4),
        ({"logprobs": 2}, 2),
    ],
)
def test_logprobs_of_both_interfaces(asked: dict[str, Any], expected: int | None) -> None:
    assert parse_line(chat(**asked), 1).logprobs == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expected exactly one of prompt and messages"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, "expected exactly one of prompt and messages"),
        ({"prompt": 5}, "prompt 5 is not valid, expected a text or a list of token ids"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2.5]}, "expected a text or a list of token ids"),
        ({"prompt": [True]}, "expected a text or a list of token ids"),
        ({"prompt": "x", "custom_id": 5}, "custom_id 5 is not valid, input should be a valid string"),
        ({"prompt": "x", "max_tokens": "20"}, "max_tokens '20' is not valid, input should be a valid integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens 0 is not valid, input should be greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens True is not valid"),
        ({"prompt": "x", "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens and max_completion_tokens differ"),
        ({"prompt": "x", "temperature": "hot"}, "temperature 'hot' is not valid"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature nan is not valid, input should be a finite number"),
        ({"prompt": "x", "stop": [1]}, "expected a text or a list of texts"),
        ({"prompt": "x", "n": 129}, "n 129 is not valid, input should be less than or equal to 128"),
        ({"prompt": "x", "logprobs": 21}, "logprobs 21 is not valid, expected true, false or a number up to 20"),
        ({"prompt": "x", "top_logprobs": 2}, "top_logprobs goes with logprobs true"),
        ({"prompt": "x", "stream": True}, "stream True is not valid, expected false: results go to the output file"),
        ({"prompt": "x", "temprature": 1}, "The parameter 'temprature' is not known"),
        ({"prompt": "x", "tools": []}, "The parameter 'tools' is not known"),
        ({"messages": []}, "messages [] is not valid"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "messages.0.content None is not valid, expected a text or a list of text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 1}]}, "The parameter 'tool_calls' is not known"),
        ({"prompt": "\ud800"}, r"The line holds half a character, '\ud800'"),
        ({"prompt": "x", "metadata": {"k": ["\udfff"]}}, "half a character"),
        (chat(temprature=1), "The parameter 'temprature' is not known"),
        (chat(top_k=1.5), "body.top_k 1.5 is not valid"),
        ({**chat(), "max_tokens": 3}, "The parameter 'max_tokens' is not known"),
        ({**chat(), "url": "/v1/embeddings"}, "url '/v1/embeddings' is not valid"),
        ({**chat(), "url": "/v1/completions"}, "/v1/completions takes a prompt"),
        ({**chat(), "method": "GET"}, "method 'GET' is not valid, input should be 'POST'"),
        ({"body": {"prompt": "x"}}, "url is missing"),
        ({"body": 3, "url": "/v1/completions"}, "body 3 is not valid"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], expected: str) -> None:
    assert expected in complaint(given)


def test_a_long_value_is_shown_in_part() -> None:
    assert len(complaint({"prompt": [0.5] * 10_000})) < 150


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"not json", "The line is not JSON: Expecting value at column 1"),
        (b'{"prompt": "x"', "The line is not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "\xff"}', "The line is not JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[1]", "The line is a list, expected a JSON object"),
        (b"null", "The line is a NoneType, expected a JSON object"),
        (b"[" * 200_000, "The line is not JSON: "),
        (b'{"seed": ' + b"9" * 5000 + b"}", "The line is not JSON: "),
    ],
    ids=range(7),
)
def test_what_is_not_an_object(data: bytes, expected: str) -> None:
    with pytest.raises(LineError, match="The line is") as caught:
        decode_line(data)
    assert caught.value.code == "invalid_json" and expected in caught.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
NAMES = st.sampled_from(
    ["custom_id", "prompt", "messages", "body", "url", "method", "stop", "n", "logprobs", "max_tokens", "seed"]
)


@settings(max_examples=40)
@given(st.dictionaries(NAMES, JSON, max_size=4))
def test_anything_is_a_line_or_an_error_line(value: dict[str, Any]) -> None:
    decoded = decode_line(json.dumps(value).encode())
    assert isinstance(custom_id_of(decoded, 3), str)
    try:
        line = parse_line(decoded, 3)
    except LineError as error:
        assert error.message.endswith(".")
    else:
        assert line.custom_id == custom_id_of(decoded, 3)


def test_names_and_texts() -> None:
    assert [custom_id_of(value, 3) for value in ({"custom_id": "a"}, {"custom_id": ""}, {"custom_id": 5}, {})] == [
        "a",
        "",
        "line-3",
        "line-3",
    ]
    assert (texts("a"), texts(["a", "", "b"]), texts("")) == (("a",), ("a", "b"), ())
