"""Pieces of text add up to the text, and never show half a character or what a stop word hides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.detokenizer import REPLACEMENT, Detokenizer, StopWords, settled_ids
from tests.support.small_tokenizer import BYTES, CONTROL, LETTERS, PIECES, write_tokenizer

VOCABULARY = [*CONTROL, *BYTES, *LETTERS, *PIECES]
Ids = Callable[..., list[int]]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def byte_ids(text: bytes) -> list[int]:
    return [VOCABULARY.index(f"<0x{byte:02X}>") for byte in text]


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, settled_ids(tokenizer))
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


tokens = st.lists(st.integers(0, len(VOCABULARY) + 3) | st.sampled_from(byte_ids("é世🦀".encode())), max_size=30)


@given(tokens)
@example([*byte_ids("é".encode()), 1, *byte_ids(b"\xff")])
@example([*byte_ids(b"\xe4\xb8"), VOCABULARY.index("a"), *byte_ids(b"\x96")])
@example([VOCABULARY.index(letter) for letter in [LETTERS[0]] * 3] + [1, VOCABULARY.index("a")])
def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.text(alphabet="abc thé世🦀.", max_size=20))
def test_text_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


def test_words_come_with_their_spaces(tokenizer: Tokenizer) -> None:
    assert pieces_of(tokenizer, tokenizer.encode("the a the"))[1:] == ["the", " a", " the", ""]


def test_a_character_of_bytes_comes_at_once(tokenizer: Tokenizer) -> None:
    crab = byte_ids("🦀".encode())
    assert pieces_of(tokenizer, [*crab, VOCABULARY.index("a")]) == ["", "", "", "", "🦀a", ""]


def through(words: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    stop, shown = StopWords(words), []
    for piece in pieces:
        text, stopped = stop.push(piece)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, stop.flush()], False


@pytest.mark.parametrize(
    ("words", "pieces", "shown", "stopped"),
    [
        ((), ["ab", "c"], ["ab", "c", ""], False),
        (("END",), ["a E", "ND b"], ["a ", ""], True),
        (("END",), ["a E", "N", "x"], ["a ", "", "ENx", ""], False),
        (("END",), ["a EN"], ["a ", "EN"], False),
        (("aab",), ["aa", "ab", "c"], ["", "a"], True),
        (("x", "yz"), ["1y", "z2x"], ["1", ""], True),
        (("later", "first"), ["first later"], [""], True),
    ],
)
def test_stop_words(words: tuple[str, ...], pieces: list[str], shown: list[str], stopped: bool) -> None:
    assert through(words, pieces) == (shown, stopped)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map("".join), st.lists(st.text("abc", max_size=3), max_size=10))
def test_text_ends_before_the_first_stop_word(word: str, pieces: list[str]) -> None:
    shown, stopped = through((word,), pieces)
    text = "".join(pieces)
    assert stopped == (word in text)
    assert "".join(shown) == text.split(word)[0]
