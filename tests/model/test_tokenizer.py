"""The tokenizer: plain text begins with <s>, a rendered chat does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from arctic_trt.errors import UsageError
from arctic_trt.model.tokenizer import Tokenizer
from tests.support.tokenizers import write_tokenizer


def test_plain_text_begins_with_the_start_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.encode("the future") == [1, 5, 6]
    assert tokenizer.decode([1, 5, 6]) == "the future"


@pytest.mark.parametrize(("reply", "tail"), [(False, [4]), (True, [4, 3, 8])])
def test_a_chat_is_rendered_by_the_template_without_a_start_token(tmp_path: Path, reply: bool, tail: list[int]) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path))
    assert tokenizer.encode_chat([{"role": "user", "content": "the future"}], reply=reply) == [3, 7, 5, 6, *tail]


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be loaded"):
        Tokenizer(tmp_path)


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path, chat=False))
    with pytest.raises(UsageError, match="has no chat_template"):
        tokenizer.encode_chat([{"role": "user", "content": "the"}], reply=True)
