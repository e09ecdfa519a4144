"""Texts that can never fit are refused before they are tokenized."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arctic_trt.errors import UsageError
from arctic_trt.triton.tensors import IDS, MESSAGES, TEXT
from arctic_trt.triton.text import Texts
from tests.support.small_tokenizer import write_tokenizer

LONGEST = len("<|im_start|>")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return Texts({"tokenizer_dir": str(directory), "max_input_len": "10"})


@pytest.mark.parametrize("name", [TEXT, MESSAGES])
def test_what_cannot_be_so_few_tokens_is_refused_at_once(texts: Texts, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(texts, "_tokenizer", None)  # it is not asked
    long = "a" * (10 * LONGEST + 1)
    value = long if name == TEXT else json.dumps([{"role": "user", "content": long[:60]}, {"role": "user", "content": long[60:]}])
    with pytest.raises(UsageError, match=rf"{name} has 121 characters, more than 120.*max_input_len"):
        texts.prompt_ids({name: value})


def test_what_may_fit_is_tokenized_whatever_comes_of_it(texts: Texts) -> None:
    """The ranks count tokens; this only keeps away what is far too long."""
    assert len(texts.prompt_ids({TEXT: "a" * 10 * LONGEST})) > 10
    assert texts.prompt_ids({IDS: list(range(500))}) == list(range(500))


def test_a_text_of_longest_tokens_fits(texts: Texts, tmp_path: Path) -> None:
    ids = texts.prompt_ids({TEXT: "<|im_start|>" * 9})
    assert len(ids) == 10, "with the one that begins it"
