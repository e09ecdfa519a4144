"""Events: their texts add up to the completion's, whatever the tokens; one call's end and failure are its own."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.completion import Completion
from arctic_trt.runtime.detokenizer import REPLACEMENT
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.runner import detokenizer_of
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.service.answers import Answers, Call
from arctic_trt.runtime.service.protocol import INTERNAL, Event
from arctic_trt.runtime.service.text import chunk_text
from arctic_trt.runtime.step import Step
from tests.support.small_tokenizer import BYTES, CONTROL, LETTERS, PIECES, write_tokenizer

VOCABULARY = [*CONTROL, *BYTES, *LETTERS, *PIECES]
SIZE = 400
LIMITS = BuildConfig(max_batch_size=8, max_input_len=50, max_seq_len=99, max_num_tokens=64, max_beam_width=1)
BROKEN = 399


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def saying(said: list[int]) -> object:
    """An engine that says given tokens, one at each position after the first; after BROKEN its logits are not finite."""

    def execute(step: Step) -> Logits:
        places = [chunk.start + at for chunk in step.chunks for at in range(chunk.logits_from, len(chunk.tokens))]
        tokens = [token for chunk in step.chunks for token in chunk.tokens[chunk.logits_from :]]
        logits_WV = torch.nn.functional.one_hot(torch.tensor([said[place] for place in places]), SIZE).float() * 50
        logits_WV[torch.tensor(tokens) == BROKEN] = float("nan")
        return Logits(logits_WV)

    return execute


def request(index: int, output: int, **options: object) -> Request:
    return Request(index=index, prompt=(7,), max_new_tokens=output, **{"sampling": Sampling(), **options})  # type: ignore[arg-type]


def answer(tokenizer: Tokenizer, said: list[int], *calls: Call) -> list[Event]:
    """All events of calls that are computed together."""
    answers = Answers(tokenizer.decode)
    batcher = Batcher(saying(said), LIMITS, detokenizer=detokenizer_of(tokenizer), listeners=answers.listeners)  # type: ignore[arg-type]
    for call in calls:
        for one in call.requests:
            batcher.add(one, text=call.needs_text)
        answers.begin(call)
    events = []
    while not batcher.idle:
        batcher.step()
        events += answers.take()
    return events


def text_of(tokenizer: Tokenizer, events: list[Event]) -> str:
    return "".join(chunk_text(tokenizer.decode, event.context_ids, event.token_ids, event.trim) for event in events)


def byte_ids(text: str) -> list[int]:
    return [VOCABULARY.index(f"<0x{byte:02X}>") for byte in text.encode()]


tokens = st.lists(
    st.integers(0, len(VOCABULARY) - 1)
    | st.sampled_from([VOCABULARY.index(piece) for piece in (*LETTERS, *PIECES)])
    | st.sampled_from(byte_ids("é世🦀")),
    min_size=1,
    max_size=30,
)
words = st.lists(st.text("abthe is", min_size=1, max_size=4) | st.sampled_from(["世", "🦀", " the", "\n"]), max_size=3)


@given(tokens, words)
@example([*byte_ids("é"), 1, *byte_ids("🦀")], ["é"])
@example([VOCABULARY.index(piece) for piece in (*LETTERS[:3], "th", "he", "is")], ["hei", "b"])
@example([VOCABULARY.index(LETTERS[0])] * 3 + [1, VOCABULARY.index("a")], [])
@example([VOCABULARY.index("th"), *byte_ids("世")[:2]], ["hx"])
def test_the_texts_of_a_calls_events_are_its_text(tokenizer: Tokenizer, said: list[int], stop: list[str]) -> None:
    one = request(128, len(said), stop_words=tuple(stop), end_ids=frozenset({2}))
    execute = saying(said)
    (whole,) = generate(execute, [one], LIMITS, detokenizer=detokenizer_of(tokenizer))  # type: ignore[arg-type]
    for stream in (True, False):
        events = answer(tokenizer, said, Call(id=1, requests=[one], stream=stream))
        assert text_of(tokenizer, events) == whole.text
        assert sum((event.token_ids for event in events), ()) == whole.token_ids
        assert [event.final for event in events] == [False] * (len(events) - 1) + [True]
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + [whole.finish_reason]
        assert not any(event.trim for event in events[:-1])
        assert stream or len(events) == 1
        assert [event.context_ids for event in events] == [(), *(event.token_ids for event in events[:-1])]


@given(st.text(alphabet="abc thé世🦀.", min_size=1, max_size=20))
def test_no_event_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    said = tokenizer.encode_bare(text)
    events = answer(tokenizer, said, Call(id=1, requests=[request(128, len(said))], stream=True))
    texts = [text_of(tokenizer, [event]) for event in events]
    assert "".join(texts) == tokenizer.decode(said) and not any(REPLACEMENT in each for each in texts)


def test_an_event_is_sent_as_soon_as_its_text_is_certain(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode_bare("the a the")
    events = answer(tokenizer, said, Call(id=1, requests=[request(128, len(said))], stream=True))
    assert [text_of(tokenizer, [event]) for event in events] == ["the", " a", " the"]
    assert [len(event.token_ids) for event in events] == [1, 1, 1]
    held = answer(tokenizer, said, Call(id=1, requests=[request(128, len(said), stop_words=("thea", "a x"))], stream=True))
    assert [text_of(tokenizer, [event]) for event in held] == ["the a the"], "each may begin a stop word until the next comes"


def test_choices_end_apart_and_the_call_with_the_last(tokenizer: Tokenizer) -> None:
    said = tokenizer.encode_bare("the a the is a")
    requests = [request(128, 4, logprobs=2), request(129, 2, logprobs=2)]
    calls = Call(id=1, requests=requests, stream=True), Call(id=2, requests=[request(256, 3)], stream=False)
    events = answer(tokenizer, said, *calls)
    ends = [(event.id, event.choice, event.finish_reason, event.final) for event in events if event.finish_reason]
    assert ends == [(1, 1, "length", False), (2, 0, "length", True), (1, 0, "length", True)]
    for choice, count in ((0, 4), (1, 2)):
        mine = [event for event in events if (event.id, event.choice) == (1, choice)]
        probabilities = [each for event in mine for each in event.logprobs or ()]
        assert [each.token for each in probabilities] == said[:count] == [token for event in mine for token in event.token_ids]
        assert all(len(event.logprobs or ()) == len(event.token_ids) for event in mine)
        assert all(each.logprob == pytest.approx(0) and len(each.top) == 2 for each in probabilities)
    assert {event.prompt_tokens for event in events} == {1}
    for event in events:
        if event.final:
            assert event.first_token_s is not None and event.total_s is not None and 0 < event.first_token_s < event.total_s
        else:
            assert event.first_token_s is event.total_s is None


def test_a_call_that_does_not_stream_costs_no_text_unless_stop_words_do() -> None:
    one = request(128, 4)
    assert not Call(id=1, requests=[one], stream=False).needs_text
    assert Call(id=1, requests=[one], stream=True).needs_text
    assert Call(id=1, requests=[replace(one, stop_words=("a",))], stream=False).needs_text


def test_a_choice_that_cannot_go_on_is_reported_and_its_call_forgotten(tokenizer: Tokenizer) -> None:
    answers = Answers(tokenizer.decode)
    said = [*tokenizer.encode_bare("the a"), BROKEN, *tokenizer.encode_bare("the a")]
    batcher = Batcher(saying(said), LIMITS, detokenizer=detokenizer_of(tokenizer), listeners=answers.listeners)  # type: ignore[arg-type]
    calls = [Call(id=1, requests=[request(128, 9), request(129, 2)], stream=True)]
    calls += [Call(id=2, requests=[request(256, 3)], stream=True)]
    for call in calls:
        for one in call.requests:
            batcher.add(one)
        answers.begin(call)
    while not answers.broken:
        batcher.step()
    ((call_id, error),) = answers.broken
    assert call_id == 1 and re.search("logits of prompt 128 at position 3 are not finite", str(error))
    answers.take()
    answers.fail(call_id, INTERNAL, "It broke.")
    assert answers.take() == [Event(id=1, final=True, error="It broke.", code=INTERNAL)]
    assert answers.indices(1) == answers.indices(2) == [] and batcher.idle
    for index in (128, 129):
        answers.listeners.on_done(index, Completion(prompt=(7,), token_ids=(), text="", finish_reason="cancelled"))
    assert answers.take() == []


def test_without_a_listener_for_errors_they_are_raised(tokenizer: Tokenizer) -> None:
    with pytest.raises(ArcticTrtError, match="not finite"):
        generate(saying([BROKEN, 6, 6]), [request(0, 3)], LIMITS)  # type: ignore[arg-type]
