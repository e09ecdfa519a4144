"""Prompts against an engine's limits, and what ends a sequence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.requests import find_end_ids, plan_requests
from arctic_trt.runtime.sampler import Sampling
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
