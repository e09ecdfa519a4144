"""From events to tensors, in pieces and at once."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.chooser import TokenLogprobs
from arctic_trt.runtime.service.protocol import Event, failure
from arctic_trt.triton.answers import Answers, Tensors, failure_in, joined, merge
from arctic_trt.triton.tensors import ENGINE_OUTPUTS, Ask, inner_name


def ask(**changes: Any) -> Ask:
    known: dict[str, Any] = {
        "body": {"prompt": [7, 8, 9]},
        "end_ids": None,
        "choices": 1,
        "stream": True,
        "echo": False,
        "pad": 0,
    }
    return Ask(**{**known, **changes})


def event(*tokens: int, choice: int = 0, **more: Any) -> Event:
    return Event(id=1, choice=choice, token_ids=tokens, **more)


def plain(tensors: Tensors) -> dict[str, Any]:
    return {name: array[0].tolist() for name, array in tensors.items()}


def test_a_piece_has_every_output() -> None:
    (response,) = Answers(ask()).take([event(4, 5, context_ids=(3,), trim=2)])
    assert plain(response) == {
        "output_ids": [[4, 5]],
        "sequence_length": [2],
        "cum_log_probs": [0.0],
        "output_log_probs": [[0.0, 0.0]],
        "finish_reason": [b""],
        "sequence_index": [0],
        "batch_index": [0],
        "prompt_tokens": [3],
        "context_ids": [3],
        "prompt_ids": [],
        "trim": [2],
        "top_logprobs_json": [b""],
    }
    assert {*response} == {inner_name(tensor) for tensor in ENGINE_OUTPUTS}
    kinds = {inner_name(tensor): (tensor.kind, len(tensor.dims) + 1) for tensor in ENGINE_OUTPUTS}
    names = {"int32": "INT32", "float32": "FP32", "object": "STRING"}
    assert all((names[str(array.dtype)], array.ndim) == kinds[name] for name, array in response.items())


def test_log_probabilities_add_up() -> None:
    answers = Answers(ask())
    first = event(4, logprobs=(TokenLogprobs(4, -1.0, ((4, -1.0), (6, -2.0))),))
    second = event(5, logprobs=(TokenLogprobs(5, -0.5, ()),), finish_reason="stop")
    responses = [plain(*answers.take([each])) for each in (first, second)]
    assert [each["cum_log_probs"] for each in responses] == [[-1.0], [-1.5]]
    assert [each["output_log_probs"] for each in responses] == [[[-1.0]], [[-0.5]]]
    assert json.loads(responses[0]["top_logprobs_json"][0]) == [[4, -1.0, [[4, -1.0], [6, -2.0]]]]
    assert responses[1]["finish_reason"] == [b"stop"]


def test_without_streaming_all_choices_come_together_and_padded() -> None:
    answers = Answers(ask(stream=False, choices=2, pad=9))
    assert answers.take([event(4, 5, choice=1, finish_reason="stop")]) == []
    (response,) = answers.take([event(6, choice=0, finish_reason="length")])
    found = plain(response)
    assert found["output_ids"] == [[6, 9], [4, 5]] and found["sequence_length"] == [1, 2]
    assert found["finish_reason"] == [b"length", b"stop"]


def test_the_prompt_comes_with_the_first_piece_of_each_choice() -> None:
    answers = Answers(ask(echo=True, choices=2))
    responses = answers.take([event(4), event(5, choice=1)]) + answers.take([event(6)])
    assert [plain(each)["prompt_ids"] for each in responses] == [[7, 8, 9], [7, 8, 9], []]


def test_an_output_of_no_tokens() -> None:
    (response,) = Answers(ask(stream=False)).take([event(finish_reason="cancelled")])
    assert response["output_ids"].shape == (1, 1, 0) and plain(response)["finish_reason"] == [b"cancelled"]


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 99), max_size=3)), max_size=12), st.integers(1, 5))
def test_what_is_sent_together_is_what_would_have_been_sent_apart(news: list[tuple[int, list[int]]], size: int) -> None:
    contexts: dict[int, tuple[int, ...]] = {}
    events = []
    for choice, tokens in news:
        events.append(event(*tokens, choice=choice, context_ids=contexts.get(choice, ())))
        contexts[choice] = tuple(tokens)
    answers = Answers(ask(choices=3))
    responses = itertools.chain.from_iterable(answers.take(events[at : at + size]) for at in range(0, len(events), size))
    said: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for response in responses:
        said[response["sequence_index"].item()] += response["output_ids"][0, 0].tolist()
    assert said == {choice: [token for each, tokens in news if each == choice for token in tokens] for choice in range(3)}


def test_joined_events_begin_as_the_first_and_end_as_the_second() -> None:
    logprob = TokenLogprobs(1, -1.0, ())
    first, second = (
        event(1, context_ids=(5,), logprobs=(logprob,)),
        event(2, context_ids=(1,), trim=1, finish_reason="stop", logprobs=(logprob,)),
    )
    both = joined(first, second)
    assert (both.context_ids, both.token_ids, both.trim, both.finish_reason) == ((5,), (1, 2), 1, "stop")
    assert both.logprobs == (logprob, logprob)
    assert merge([first, event(9, choice=1), second]) == [both, event(9, choice=1)]


def test_a_failure_is_found() -> None:
    bad = failure(1, "internal", "No.")
    assert failure_in([event(1), bad]) is bad and failure_in([event(1)]) is None
