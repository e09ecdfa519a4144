"""From the tensors of a request to what the ranks are asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.runtime.jobs.lines import Flat
from arctic_trt.triton.tensors import (
    CLIENT_INPUTS,
    CLIENT_OUTPUTS,
    ENGINE_INPUTS,
    PARAMETERS,
    Values,
    choices_of,
    in_tensors,
    plan_ask,
    read_values,
    refuse_unknown,
    shortest,
    unpadded,
)
from tests.support.fake_stub import strings

DOCS = Path(__file__).parents[2] / "docs" / "triton.md"


def values_of(**arrays: Any) -> Values:
    return read_values(arrays, CLIENT_INPUTS)


def ask_for(**values: Any) -> dict[str, Any]:
    return dict(plan_ask(values, [1, 2], echo=False).body)


def test_values_are_plain() -> None:
    values = values_of(
        text_input=strings("Grüße 🎉"),
        max_tokens=np.array([[7]], np.int32),
        temperature=np.array([[0.7]], np.float32),
        stream=np.array([[True]]),
        stop_words=strings("a", ""),
        random_seed=np.array([[2**63]], np.uint64),
    )
    assert values == {
        "text_input": "Grüße 🎉",
        "max_tokens": 7,
        "temperature": 0.7,
        "stream": True,
        "stop_words": ["a", ""],
        "random_seed": 2**63,
    }
    assert type(values["stream"]) is bool and type(values["max_tokens"]) is int


def test_inner_names() -> None:
    arrays = {"request_output_len": np.array([[3]]), "runtime_top_k": np.array([[4]]), "top_p": np.array([[0.5]], np.float32)}
    assert read_values(arrays, ENGINE_INPUTS, inner=True) == {"max_tokens": 3, "top_k": 4}


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"text_input": strings(b"\xff")}, "text_input is not UTF-8 text (invalid start byte at byte 0)."),
        ({"max_tokens": np.array([[1, 2]])}, "max_tokens has 2 values, expected 1."),
        ({"beam_width": np.array([[2]])}, "beam_width 2 is not supported, expected 1."),
        ({"return_context_logits": np.array([[True]])}, "return_context_logits True is not supported, expected 0."),
        ({"length_penalty": np.array([[0.5]], np.float32)}, "length_penalty 0.5 is not supported, expected 1."),
    ],
)
def test_what_cannot_be(arrays: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        values_of(**arrays)
    assert caught.value.message == complaint


def test_what_clients_of_tensorrt_llm_send_without_meaning_is_taken() -> None:
    arrays = {
        "beam_width": np.array([[1]]),
        "length_penalty": np.array([[1.0]], np.float32),
        "return_context_logits": np.array([[False]]),
    }
    assert ask_for(**values_of(**arrays)) == ask_for()


@pytest.mark.parametrize(("given_name", "hint"), [("max_token", "Did you mean 'max_tokens'?"), ("zzz", "Leave it out.")])
def test_unknown_parameters_are_named(given_name: str, hint: str) -> None:
    refuse_unknown("")
    with pytest.raises(UsageError, match="is not known") as caught:
        refuse_unknown(json.dumps({given_name: 1}))
    assert caught.value.message == f"The parameter {given_name!r} is not known." and caught.value.hint == hint


def test_the_body_is_a_line_of_a_batch_job() -> None:
    body = ask_for(
        max_tokens=5, stop_words=["x", ""], bad_words=[], num_return_sequences=2, seed=3, top_k=1, stream=True, min_p=0.1
    )
    expected = {"max_tokens": 5, "stop": ["x"], "bad_words": [], "n": 2, "seed": 3, "top_k": 1, "stream": True, "min_p": 0.1}
    assert body == {"prompt": [1, 2], **expected}
    assert {tensor.field for tensor in PARAMETERS} - {"", "stream"} <= Flat.model_fields.keys()


def test_without_any_parameter_there_is_one_answer_at_the_end() -> None:
    ask = plan_ask({}, [1], echo=False)
    assert (ask.body, ask.choices, ask.stream, ask.end_ids, ask.echo) == ({"prompt": [1], "stream": False}, 1, False, None, False)


def test_both_names_of_the_seed() -> None:
    assert ask_for(random_seed=4)["seed"] == ask_for(seed=4)["seed"] == ask_for(seed=4, random_seed=4)["seed"] == 4
    with pytest.raises(UsageError, match="seed and random_seed differ"):
        ask_for(seed=4, random_seed=5)


def test_log_probabilities() -> None:
    assert ask_for(return_log_probs=True)["logprobs"] == 0
    assert ask_for(return_log_probs=True, top_logprobs=3)["logprobs"] == 3
    assert "logprobs" not in ask_for(return_log_probs=False, top_logprobs=0)
    with pytest.raises(UsageError, match="top_logprobs goes with return_log_probs"):
        ask_for(top_logprobs=3)


@pytest.mark.parametrize(("given_id", "expected"), [(5, (5,)), (-1, ()), (0, (0,))])
def test_end_ids(given_id: int, expected: tuple[int, ...]) -> None:
    assert plan_ask({"end_id": given_id}, [1], echo=False).end_ids == expected


@pytest.mark.parametrize(("values", "default", "expected"), [({}, True, True), ({"exclude_input_in_output": True}, True, False)])
def test_whether_the_prompt_comes_first(values: Values, default: bool, expected: bool) -> None:
    assert plan_ask(values, [1], echo=default).echo is expected


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (0, 1), (-2, 1)])
def test_choices(count: int, expected: int) -> None:
    assert choices_of({"num_return_sequences": count}) == expected


def test_a_prompt_of_ids_may_be_padded() -> None:
    assert unpadded({"input_ids": [5, 6, 0, 0], "input_lengths": 2}) == [5, 6]
    assert unpadded({"input_ids": [5, 6]}) == [5, 6]
    for wrong in (3, -1):
        with pytest.raises(UsageError, match=f"input_lengths {wrong} is out of range"):
            unpadded({"input_ids": [5, 6], "input_lengths": wrong})
    with pytest.raises(UsageError, match="input_ids is missing"):
        unpadded({})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("n 200 is not valid.", "num_return_sequences 200 is not valid."),
        ("logprobs 30 is not valid.", "top_logprobs 30 is not valid."),
        ("temperature -1.0 is out of range.", "temperature -1.0 is out of range."),
        ("The prompt n is empty.", "The prompt n is empty."),
    ],
)
def test_errors_name_tensors(message: str, expected: str) -> None:
    assert in_tensors(message) == expected


@given(st.decimals(0, 100, places=3, allow_nan=False))
def test_decimals_survive_float32(number: Any) -> None:
    assert shortest(float(np.float32(float(number)))) == float(number)


def test_the_documentation_has_every_tensor() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert [tensor.name for tensor in (*CLIENT_INPUTS, *CLIENT_OUTPUTS) if f"| `{tensor.name}` |" not in text] == []
