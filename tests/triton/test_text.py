"""Prompts in their forms, and the text of responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.detokenizer import Detokenizer, settled_ids
from arctic_trt.runtime.service.protocol import Event
from arctic_trt.triton.answers import Answers, merge
from arctic_trt.triton.stages import Postprocessing, Preprocessing
from arctic_trt.triton.tensors import plan_ask
from arctic_trt.triton.text import Texts, prompt_arrays
from tests.support.fake_stub import FakeTriton, Request, model_args, strings

TINY = Path(__file__).parents[1] / "data" / "tiny-arctic"
SETTINGS = {"tokenizer_dir": str(TINY), "max_input_len": "4096"}


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(SETTINGS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def test_prompts_in_all_forms(texts: Texts, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    assert texts.prompt_ids({"text_input": "Hi"}) == tokenizer.encode("Hi")
    assert texts.prompt_ids({"messages": json.dumps(turns)}) == tokenizer.encode_chat(turns, reply=True)
    assert texts.prompt_ids({"input_ids": [5, 6]}) == [5, 6]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({}, "The request has no prompt, expected exactly one of text_input, messages and input_ids."),
        ({"text_input": "a", "input_ids": [1]}, "The request has text_input and input_ids, expected exactly one"),
        ({"text_input": ""}, "text_input is empty."),
        ({"messages": "hello"}, "messages is not JSON"),
        ({"messages": "{}"}, "messages is not a list of objects"),
        ({"messages": "[]"}, "messages is not a list of objects"),
        ({"messages": '[{"role": "user"}]'}, "messages is not a list of objects"),
    ],
)
def test_prompts_that_are_none(texts: Texts, values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        texts.prompt_ids(values)
    assert caught.value.message.startswith(complaint)


def events_of_text(tokenizer: Tokenizer, ids: list[int]) -> list[Event]:
    """The events that the ranks send for ``ids``: cut where text is certain."""
    settled, events, context, new = settled_ids(tokenizer), [], (), []  # type: ignore[var-annotated]
    detokenizer = Detokenizer(tokenizer.decode, settled)
    for token in ids:
        new.append(token)
        if detokenizer.push(token):
            events.append(Event(id=1, token_ids=tuple(new), context_ids=context))
            context, new = tuple(new), []
    return [*events, Event(id=1, token_ids=tuple(new), context_ids=context, finish_reason="length", final=True)]


@given(data=st.data(), text=st.text(st.sampled_from("ab thé日本🎉\n."), max_size=12))
def test_pieces_add_up_however_many_come_together(texts: Texts, tokenizer: Tokenizer, data: st.DataObject, text: str) -> None:
    ids = tokenizer.encode_bare(text) + data.draw(st.lists(st.integers(3, 500), max_size=4))
    events = events_of_text(tokenizer, ids)
    said, answers = "", Answers(plan_ask({"stream": True}, [1], echo=False))
    while events:
        size = data.draw(st.integers(1, len(events)))
        for response in answers.take(events[:size]):
            said += texts.outputs(response)["text_output"][0].decode()
        events = events[size:]
    assert said == tokenizer.decode(ids)
    assert merge(events_of_text(tokenizer, ids))[0].token_ids == tuple(ids)


def test_the_prompt_and_the_output_are_one_text(texts: Texts, tokenizer: Tokenizer) -> None:
    prompt, new = tokenizer.encode("The future"), tokenizer.encode_bare("of AI")
    answers = Answers(plan_ask({}, prompt, echo=True))
    (response,) = answers.take([Event(id=1, token_ids=tuple(new), trim=1, finish_reason="stop", final=True)])
    (text,) = texts.outputs(response)["text_output"]
    assert text.decode() == "The future of A"


def test_the_likeliest_tokens_are_named(texts: Texts, tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode_bare("the")
    logprob = TokenLogprobs(token, -0.5, ((token, -0.5), (3 + 0xE2, -3.0)))
    answers = Answers(plan_ask({"return_log_probs": True}, [1], echo=False))
    (response,) = answers.take([Event(id=1, token_ids=(token,), logprobs=(logprob,), finish_reason="length", final=True)])
    (item,) = json.loads(texts.outputs(response)["top_logprobs_json"].item())
    assert (item["token"], item["text"], item["logprob"]) == (token, " the", -0.5)
    assert [each["logprob"] for each in item["top"]] == [-0.5, -3.0]


def test_stages_of_the_ensemble(tokenizer: Tokenizer) -> None:
    triton, args = FakeTriton(), model_args(**SETTINGS)
    before, behind = Preprocessing(triton, args), Postprocessing(triton, args)
    good, bad, unknown = (
        Request({"text_input": strings(text)}, outputs=[], parameters=parameters)
        for text, parameters in (("Hi", None), (b"\xff", None), ("Hi", {"maxtokens": 3}))
    )
    encoded, refused, also = before.execute([good, bad, unknown])
    assert encoded.arrays["input_ids"].tolist() == [tokenizer.encode("Hi")]
    assert encoded.arrays["input_lengths"].tolist() == [[len(tokenizer.encode("Hi"))]]
    assert refused.error().message().startswith("text_input is not UTF-8") and refused.error().code() == "INVALID_ARG"
    assert "Did you mean 'max_tokens'?" in also.error().message()
    ids = tokenizer.encode_bare("fine")
    (piece,) = Answers(plan_ask({"stream": True}, [1], echo=False)).take([Event(id=1, token_ids=tuple(ids))])
    (decoded,) = behind.execute([Request(piece, outputs=[])])
    assert decoded.arrays["text_output"].tolist() == [b"fine"]


def test_a_prompt_as_the_engine_takes_it() -> None:
    arrays = prompt_arrays([3, 4])
    assert {name: (array.tolist(), str(array.dtype)) for name, array in arrays.items()} == {
        "input_ids": ([[3, 4]], "int32"),
        "input_lengths": ([[2]], "int32"),
    }
