"""Texts and tensors around the C++ backend, against an engine that is played: it says what it is told to, in any pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.triton.legacy_text import Arrays, LegacyCall, LegacyText, decoded, join_padded, word_list
from tests.support.small_tokenizer import write_tokenizer

TEXTS = st.text(st.sampled_from("the is 世é🙂 .\n"), min_size=1, max_size=30)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> LegacyText:
    return LegacyText(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def call(text: LegacyText, **given: Any) -> LegacyCall:
    """A client's request; strings and lists of strings become STRING tensors."""
    arrays = {}
    for name, value in {"text_input": "the", "max_tokens": 5, **given}.items():
        words = value if isinstance(value, list) else [value]
        items = [word.encode() if isinstance(word, str) else word for word in words]
        arrays[name] = np.array([items], np.object_ if isinstance(items[0], bytes) else None)
    return LegacyCall(text, arrays)


def response(*sequences: list[int], index: int | None = None, **more: Any) -> Arrays:
    """One of the engine's, as the C++ backend shapes it: shorter sequences are padded with -1."""
    longest = max(map(len, sequences))
    tensors = {
        "output_ids": np.array([[ids + [-1] * (longest - len(ids)) for ids in sequences]], np.int32),
        "sequence_length": np.array([[len(ids) for ids in sequences]], np.int32),
    }
    return tensors | ({} if index is None else {"sequence_index": np.array([[index]], np.int32)}) | more


def texts(responses: list[Arrays]) -> list[str]:
    return [item.decode() for answer in responses for item in answer["text_output"].reshape(-1)]


@settings(max_examples=30, deadline=None)
@given(said=TEXTS, cuts=st.lists(st.integers(1, 3), max_size=60))
def test_pieces_add_up_and_never_hold_half_a_character(text: LegacyText, said: str, cuts: list[int]) -> None:
    ids = text.tokenizer.encode_bare(said)
    asked = call(text, stream=True)
    pieces, begin = [], 0
    for size in [*cuts, len(ids)]:
        if ids[begin : begin + size]:
            pieces += texts(asked.take(response(ids[begin : begin + size])))
            begin += size
    pieces += texts(asked.finish())
    assert "".join(pieces) == text.tokenizer.decode(ids) == text.whole(ids, [])
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=5))
def test_words_can_be_read_back_from_their_list(words: list[list[int]]) -> None:
    ids, ends = word_list(words)
    assert len(ids) == len(ends) >= 1
    ends = [end for end in ends if end >= 0]
    assert [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)] == words


def test_what_the_engine_is_asked(text: LegacyText) -> None:
    asked = call(
        text, text_input="the is", max_tokens=7, top_k=3, temperature=0.5, stream=True, stop_words=["is", ""], seed=9
    ).ask()
    prompt = text.tokenizer.encode("the is")
    assert asked["input_ids"].tolist() == [prompt] and asked["input_lengths"].tolist() == [[len(prompt)]]
    assert asked["request_output_len"].tolist() == [[7]]
    assert [asked[name].item() for name in ("runtime_top_k", "temperature", "seed", "streaming")] == [3, 0.5, 9, True]
    assert asked["exclude_input_in_output"].item() is True
    assert asked["end_id"].item() == 4, "the tokenizer's end token; the others end a sequence as words of one token"
    ids, ends = asked["stop_words_list"][0].tolist()
    assert ids[:2] == [300, 2] and ends[:2] == [1, 2]
    assert asked["bad_words_list"].tolist() == [[[0], [-1]]]
    assert "beam_width" not in asked


def test_a_client_may_name_its_own_end_token(text: LegacyText) -> None:
    asked = call(text, end_id=7, pad_id=1).ask()
    assert (asked["end_id"].item(), asked["pad_id"].item()) == (7, 1)
    assert asked["stop_words_list"].tolist() == [[[0], [-1]]]
    none = call(text, end_id=-1).ask()
    assert (none["end_id"].item(), none["pad_id"].item()) == (-1, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_word_ends_the_text_and_what_follows_is_not_sent(text: LegacyText, stream: bool) -> None:
    asked = call(text, stream=stream, stop_words=["st"])
    ids = text.tokenizer.encode_bare("the state")
    sent = [piece for token in ids for piece in texts(asked.take(response([token])))]
    assert asked.over
    assert "".join(sent + texts(asked.finish())) == "the "


def test_sequences_of_a_prompt_come_in_one_answer(text: LegacyText) -> None:
    asked = call(text, num_return_sequences=2)
    first, second = text.tokenizer.encode_bare("the"), text.tokenizer.encode_bare("is the")
    log_probs = [np.full((1, 1, len(ids)), -1.0, np.float32) for ids in (first, second)]
    assert not asked.take(response(second, index=1, output_log_probs=log_probs[1]))
    assert not asked.over
    assert not asked.take(response(first, index=0, output_log_probs=log_probs[0]))
    (answer,) = asked.finish()
    assert texts([answer]) == ["the", "is the"]
    assert answer["sequence_length"].tolist() == [[len(first), len(second)]]
    assert answer["output_log_probs"].shape == (1, 2, max(len(first), len(second)))


def test_pieces_of_sequences_say_whose_they_are(text: LegacyText) -> None:
    asked = call(text, num_return_sequences=2, stream=True)
    sent = [
        piece
        for index in (1, 0, 1)
        for piece in asked.take(response(text.tokenizer.encode_bare("the"), index=index, cum_log_probs=np.array([[-index]])))
    ]
    assert [piece["sequence_index"].item() for piece in sent] == [1, 0, 1]
    assert [piece["cum_log_probs"].item() for piece in sent] == [-1, 0, -1]


def test_the_prompt_comes_first_where_it_is_wanted(text: LegacyText) -> None:
    ids = text.tokenizer.encode_bare("is the")
    for stream in (False, True):
        asked = call(text, text_input="a ", stream=stream, exclude_input_in_output=False)
        sent = [piece for token in ids for piece in texts(asked.take(response([token])))]
        assert "".join(sent + texts(asked.finish())) == "a is the"


def test_an_engine_without_an_answer_gives_none(text: LegacyText) -> None:
    assert call(text).finish() == []


def test_requests_that_cannot_be(text: LegacyText) -> None:
    with pytest.raises(UsageError, match="max_tokens 0 is not a positive number"):
        call(text, max_tokens=0).ask()
    with pytest.raises(UsageError, match="text_input is not valid UTF-8"):
        LegacyCall(text, {"text_input": np.array([[b"a\xff"]], np.object_)})
    assert decoded("é".encode(), "x") == "é"


def test_arrays_of_different_lengths_are_padded() -> None:
    joined = join_padded([np.ones((1, 1, 2)), np.ones((1, 2, 3))])
    assert joined.tolist() == [[[1, 1, 0], [1, 1, 1], [1, 1, 1]]]
    assert join_padded([np.array([[1]]), np.array([[2]])]).tolist() == [[1, 2]]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        LegacyText(tmp_path)
