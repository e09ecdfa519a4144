"""Prompts against an engine's limits, and what ends a sequence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.requests import find_end_ids, plan_requests, word_ids
from arctic_trt.runtime.sampler import Sampling, plan_sampling
from tests.support.small_tokenizer import write_tokenizer

LIMITS = BuildConfig(max_batch_size=4, max_input_len=10, max_seq_len=16, max_num_tokens=32, max_beam_width=1)


def plan(prompts: list[list[int]], max_new_tokens: int = 4) -> list[tuple[int, ...]]:
    requests = plan_requests(prompts, LIMITS, 100, max_new_tokens=max_new_tokens, sampling=Sampling())
    assert [request.index for request in requests] == list(range(len(prompts)))
    return [request.prompt for request in requests]


def test_prompts_that_fit() -> None:
    assert plan([[0, 99], [1] * 10]) == [(0, 99), (1,) * 10]
    assert plan([[1] * 10], 6)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "complaint"),
    [
        ([], 4, "no prompt"),
        ([[1], []], 4, "Prompt 1 is empty"),
        ([[1, 100]], 4, "Prompt 0 has token id 100, expected 0 to 99"),
        ([[-1]], 4, "token id -1"),
        ([[1], [1] * 11], 4, "Prompt 1 has 11 tokens, the engine was built for --max_input_len 10"),
        ([[1] * 10], 7, "Prompt 0 has 10 tokens, which with --max_output_len 7 exceeds the engine's --max_seq_len 16. At most 6"),
        ([[1]], 0, "--max_output_len 0"),
    ],
)
def test_prompts_that_do_not_fit(prompts: list[list[int]], max_new_tokens: int, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(prompts, max_new_tokens)
    assert complaint in str(caught.value)


def test_each_prompt_is_asked_for_as_often_as_wanted() -> None:
    sampling = plan_sampling(temperature=1.0)
    given: dict[str, Any] = {"max_new_tokens": 4, "sampling": sampling, "bad_words": ((5, 99),), "logprobs": 0}
    requests = plan_requests([[1], [2, 3]], LIMITS, 100, num_return_sequences=3, prompt_logits=True, **given)
    assert [request.index for request in requests] == list(range(6))
    assert [request.prompt for request in requests] == [(1,)] * 3 + [(2, 3)] * 3
    assert [request.prompt_logits for request in requests] == [True, False, False] * 2
    assert {(request.bad_words, request.logprobs) for request in requests} == {(((5, 99),), 0)}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_return_sequences": 0}, "--num_return_sequences 0 is not a positive number"),
        ({"num_return_sequences": 2}, "--num_return_sequences 2 would give equal outputs"),
        ({"logprobs": -1}, "--logprobs -1 is out of range"),
        ({"bad_words": ((1, 100),)}, r"--bad_words has the token ids \[1, 100\], expected at least one, from 0 to 99"),
        ({"bad_words": ((),)}, "--bad_words has the token ids"),
    ],
)
def test_wishes_that_cannot_be_met(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_requests([[1]], LIMITS, 100, max_new_tokens=1, sampling=Sampling(), **options)


def test_words_in_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    found = word_ids(["sea", "sea"], tokenizer)
    assert tuple(tokenizer.encode_bare("sea")) in found and len(set(found)) == len(found) == 2
    assert all(tokenizer.decode(list(ids)).strip() == "sea" for ids in found)
    assert word_ids(["sea"], None) == ()


def test_end_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert find_end_ids(7, tokenizer, tmp_path) == (7,)
    assert find_end_ids(-1, tokenizer, tmp_path) == ()
    assert find_end_ids(None, None, None) == ()
    assert find_end_ids(None, tokenizer, tmp_path) == (4, 300, 2), "the tokenizer's, the generation config's, </s>"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert find_end_ids(None, None, tmp_path) == (9,)
    (tmp_path / "generation_config.json").unlink()
    assert find_end_ids(None, tokenizer, tmp_path) == (4, 2)


@pytest.mark.parametrize("content", ["[]", "{", '{"eos_token_id": "x"}'])
def test_a_broken_generation_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UsageError, match=r"generation_config\.json"):
        find_end_ids(None, None, tmp_path)
