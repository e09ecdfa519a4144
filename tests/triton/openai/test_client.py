"""OpenAI's own client, as it comes."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from arctic_trt.triton.openai.engine import EngineError
from tests.support.scripted_engine import PIECES, ScriptedEngine, listening
from tests.triton.openai.conftest import Connect

TEXT = "".join(PIECES)
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def test_models(connect: Connect) -> None:
    client = connect(ScriptedEngine(), model="snowflake/arctic")
    assert [model.id for model in client.models.list()] == ["snowflake/arctic"]
    assert client.models.retrieve("snowflake/arctic").owned_by == "arctic-trt"
    with pytest.raises(openai.NotFoundError, match=r"The model 'other' does not exist, expected 'snowflake/arctic'."):
        client.models.retrieve("other")


def test_a_chat_and_its_second_turn(connect: Connect) -> None:
    engine = ScriptedEngine()
    client = connect(engine)
    answer = client.chat.completions.create(model="arctic", messages=HELLO, max_tokens=9, temperature=0.5, seed=7, stop=["\n"])
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 4, 9)
    assert answer.id.startswith("chatcmpl-") and answer._request_id == answer.id
    client.chat.completions.create(model="arctic", messages=[*HELLO, choice.message, {"role": "user", "content": "and?"}])
    first, second = engine.asked
    assert first == {
        **{"messages": HELLO, "n": 1, "stream": False, "max_tokens": 9, "temperature": 0.5, "seed": 7, "stop": ["\n"]},
    }
    assert second["messages"] == [*HELLO, {"role": "assistant", "content": TEXT}, {"role": "user", "content": "and?"}]


def test_a_chat_streams(connect: Connect) -> None:
    stream = connect(ScriptedEngine()).chat.completions.create(
        model="arctic", messages=HELLO, stream=True, stream_options={"include_usage": True}, max_tokens=3
    )
    *events, usage = list(stream)
    assert "".join(event.choices[0].delta.content or "" for event in events) == "".join(PIECES[:3])
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events] == [None] * 4 + ["length"]
    assert usage.choices == [] and usage.usage and usage.usage.total_tokens == 8


def test_the_client_s_helper_for_streams(connect: Connect) -> None:
    with connect(ScriptedEngine()).chat.completions.stream(model="arctic", messages=HELLO, n=2) as stream:
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [TEXT, TEXT]


def test_pieces_arrive_one_by_one(connect: Connect) -> None:
    engine = ScriptedEngine(delay_s=0.05)
    stream = connect(engine).chat.completions.create(model="arctic", messages=HELLO, stream=True)
    for event in stream:
        if event.choices[0].delta.content:
            assert engine.under_way == 1, "the whole answer was there before its first piece"
            break
    stream.close()


def test_log_probabilities(connect: Connect) -> None:
    client = connect(ScriptedEngine())
    chat = client.chat.completions.create(model="arctic", messages=HELLO, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert chat and chat.content
    assert [item.token for item in chat.content] == PIECES and chat.content[0].bytes == list(b"The ")
    assert [(item.token, item.logprob) for item in chat.content[1].top_logprobs] == [("future ", -0.5), ("other1", -1.5)]
    stream = client.completions.create(model="arctic", prompt="a", logprobs=1, stream=True)
    offsets = [event.choices[0].logprobs.text_offset[0] for event in stream if event.choices[0].logprobs]  # type: ignore[index]
    assert offsets == [0, 4, 11, 14]


def test_completions_of_several_prompts(connect: Connect) -> None:
    engine = ScriptedEngine(reply=lambda fields: [str(fields["prompt"])])
    answer = connect(engine).completions.create(model="arctic", prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert answer.id.startswith("cmpl-") and answer.usage and answer.usage.prompt_tokens == 10


def test_a_completion_of_token_ids_streams(connect: Connect) -> None:
    engine = ScriptedEngine()
    stream = connect(engine).completions.create(model="arctic", prompt=[1, 2, 3], stream=True)
    assert "".join(event.choices[0].text for event in stream) == TEXT
    assert engine.asked[0]["prompt"] == [1, 2, 3]


def test_the_asynchronous_client_with_many_requests() -> None:
    engine = ScriptedEngine(reply=lambda fields: [*fields["messages"][0]["content"]], delay_s=0.001)

    async def ask(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            asks = [
                client.chat.completions.create(model="arctic", messages=[{"role": "user", "content": f"question {number}"}])
                for number in range(64)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asks)]

    with listening(engine) as url:
        assert asyncio.run(ask(url)) == [f"question {number}" for number in range(64)]


@pytest.mark.parametrize(
    ("failure", "expected", "status"),
    [
        (EngineError("invalid", "The prompt has 9 tokens, expected at most 8."), openai.BadRequestError, 400),
        (EngineError("busy", "The queue is full; ask again."), openai.RateLimitError, 429),
        (EngineError("unavailable", "The group starts again."), openai.InternalServerError, 503),
        (EngineError("internal", "The engine failed."), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_has_its_status(
    connect: Connect, failure: EngineError, expected: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    with pytest.raises(expected) as caught:
        connect(ScriptedEngine(failure=failure)).chat.completions.create(model="arctic", messages=HELLO, stream=stream)
    assert caught.value.status_code == status and failure.message in str(caught.value)


def test_a_stream_that_fails_says_so(connect: Connect) -> None:
    engine = ScriptedEngine(failure=EngineError("internal", "The worker group died; ask again."), pieces_first=2)
    stream = connect(engine).chat.completions.create(model="arctic", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match=r"The worker group died; ask again\."):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pieces", [PIECES, []])
def test_an_answer_that_breaks_off_is_an_error(connect: Connect, pieces: list[str], stream: bool) -> None:
    client = connect(ScriptedEngine(reply=lambda _: pieces, finishes=False))
    with pytest.raises(openai.APIError, match="broke off"):
        answer = client.chat.completions.create(model="arctic", messages=HELLO, stream=stream)
        list(answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_an_error_without_its_particulars(connect: Connect, stream: bool) -> None:
    engine = ScriptedEngine(failure=ZeroDivisionError("secret"))
    with pytest.raises(openai.InternalServerError) as caught:
        connect(engine).completions.create(model="arctic", prompt="a", stream=stream)
    assert "log" in str(caught.value) and "secret" not in str(caught.value)


def test_unknown_models_and_parameters(connect: Connect) -> None:
    client = connect(ScriptedEngine())
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist") as caught:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="The parameter 'colour' is not known"):
        client.chat.completions.create(model="arctic", messages=HELLO, extra_body={"colour": "red"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="arctic", messages=HELLO, extra_body={"temperature": "hot"})


def test_the_key(connect: Connect) -> None:
    engine = ScriptedEngine()
    answer = connect(engine, api_key="s3cret", key="s3cret").completions.create(model="arctic", prompt="a")
    assert answer.choices[0].text == TEXT
    with pytest.raises(openai.AuthenticationError, match="The API key is wrong") as caught:
        connect(engine, api_key="s3cret", key="S3cret").models.list()
    assert caught.value.code == "invalid_api_key"
    assert len(engine.asked) == 1
