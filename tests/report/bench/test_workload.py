"""Prompts: of the length that was asked for, different from each other, and the same for the same seed."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.report.bench.workload import FilePrompts, RandomPrompts, SpelledPrompts, words_of
from arctic_trt.runtime.inputs import Prompt
from tests.support.small_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 9), st.integers(2, 12)), max_size=6), st.integers(0, 3))
def test_random_prompts_share_no_beginning(size: int, takes: list[tuple[int, int]], seed: int) -> None:
    source, again = RandomPrompts(range(100, 100 + size), seed), RandomPrompts(range(100, 100 + size), seed)
    prompts = [prompt.token_ids for count, length in takes for prompt in source.take(count, length)]
    assert prompts == [prompt.token_ids for count, length in takes for prompt in again.take(count, length)]
    assert [len(prompt) for prompt in prompts] == [length for count, length in takes for _ in range(count)]
    assert all(100 <= token < 100 + size for prompt in prompts for token in prompt)
    beginnings = [prompt[:2] for prompt in prompts][: size * size]
    assert len(set(beginnings)) == len(beginnings)


def test_random_prompts_are_random() -> None:
    (prompt,), (other,) = RandomPrompts(range(1000), 0).take(1, 500), RandomPrompts(range(1000), 1).take(1, 500)
    assert prompt != other and 350 < len(set(prompt.token_ids)) < 440  # 393 expected of 500 draws


def test_random_prompts_need_a_length() -> None:
    with pytest.raises(UsageError, match="need a length"):
        RandomPrompts(range(9), 0).take(1, None)


def test_a_single_token_may_repeat() -> None:
    assert [prompt.token_ids for prompt in RandomPrompts([7], 0).take(2, 1)] == [(7,), (7,)]


def test_prompts_of_a_file_come_in_order_are_cut_and_repeat(caplog: pytest.LogCaptureFixture, tokenizer: Tokenizer) -> None:
    prompts = [Prompt(where="a", token_ids=(5, 6, 7)), Prompt(where="b", text="the sea")]
    source = FilePrompts(prompts, tokenizer)
    sea = tuple(tokenizer.encode("the sea"))
    with caplog.at_level(logging.WARNING):
        assert [prompt.token_ids for prompt in source.take(2, None)] == [(5, 6, 7), sea]
        assert not caplog.records
        assert [prompt.token_ids for prompt in source.take(3, 2)] == [(5, 6), sea[:2], (5, 6)]
        source.take(4, None)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["--input_file has 2 prompts and more are needed"]


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(UsageError, match="row 0 is text, which needs a tokenizer"):
        FilePrompts([Prompt(where="row 0", text="the sea")], None)


@pytest.mark.parametrize("length", [2, 5, 60])
def test_text_has_as_many_tokens_as_asked(tokenizer: Tokenizer, length: int) -> None:
    for prompt in SpelledPrompts(RandomPrompts(words_of(tokenizer), 4), tokenizer).take(5, length):
        assert prompt.text and tuple(tokenizer.encode(prompt.text)) == prompt.token_ids
        assert len(prompt.token_ids) == length


def test_words_are_whole_and_no_control_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = tokenizer.hf.convert_ids_to_tokens(words_of(tokenizer))
    assert {"▁the", "▁a"} <= set(pieces) and all(piece.startswith("▁") and piece[1:].isalpha() for piece in pieces)
    assert "▁is" not in pieces  # this tokenizer never makes it of text: it joins the mark and the i first

    class Bytes:
        all_special_ids = (0,)

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {"<s>": 0, "a": 2, "b": 1}

    monkeypatch.setattr(tokenizer, "_hf", Bytes)
    assert words_of(tokenizer) == [1, 2]
