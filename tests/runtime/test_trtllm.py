"""A run on a TensorRT engine, with a session that answers as TensorRT-LLM does: what becomes of its tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.engine.tensorrt_llm.session import NO_END, Decoding
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.detokenizer import Detokenizer, settled_ids
from arctic_trt.runtime.requests import Request, word_ids
from arctic_trt.runtime.sampler import Sampling, plan_sampling
from arctic_trt.runtime.trtllm import generate_with_trtllm, plan_choice, plan_decoding
from tests.runtime.conftest import Model

END = 2


@dataclass
class Answers:
    """A session that says what it is told to, and remembers what it was asked.

    As TensorRT-LLM: at most ``max_new_tokens``, without the end token, stop words included.
    """

    answers: dict[tuple[int, ...], list[int]]
    gathers_logits: bool = False
    counts_prompt: bool = False
    asked: list[tuple[list[tuple[int, ...]], Decoding]] = field(default_factory=list)

    def _answer(self, prompt: Sequence[int], decoding: Decoding) -> list[int]:
        ids = self.answers[tuple(prompt)][: decoding.max_new_tokens]
        return ids[: ids.index(decoding.end_id)] if decoding.end_id in ids else ids

    def generate(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[list[int]]:
        self.asked.append(([tuple(prompt) for prompt in prompts], decoding))
        return [self._answer(prompt, decoding) for prompt in prompts for _ in range(decoding.num_return_sequences)]

    def generate_one(self, prompt: Sequence[int], decoding: Decoding) -> tuple[list[list[int]], Tensor]:
        return self.generate([prompt], decoding), torch.full((len(prompt), 6), float(prompt[0]))

    def stream(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> Iterator[list[list[int]]]:
        whole = self.generate(prompts, decoding)
        for length in range(1, max(map(len, whole), default=0) + 1):
            yield [ids[:length] for ids in whole]


def request(prompt: tuple[int, ...], index: int = 0, *, new: int = 5, **more: Any) -> Request:
    given = {"sampling": Sampling(), "end_ids": frozenset({END}), **more}
    return Request(index=index, prompt=prompt, max_new_tokens=new, **given)


def complete(
    session: Answers,
    requests: list[Request],
    *,
    batch: int = 8,
    pad: int = END,
    tokenizer: Tokenizer | None = None,
    listeners: Listeners | None = None,
    streaming: bool = False,
    num_return_sequences: int = 1,
) -> list[Completion]:
    return generate_with_trtllm(
        session,
        requests,
        batch,
        pad=pad,
        tokenizer=tokenizer,
        detokenizer=(lambda: Detokenizer(tokenizer.decode, settled_ids(tokenizer))) if tokenizer else lambda: None,
        listeners=listeners or Listeners(),
        streaming=streaming,
        num_return_sequences=num_return_sequences,
    )


def outcome(completion: Completion) -> tuple[tuple[int, ...], str]:
    return completion.token_ids, completion.finish_reason


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([7, 8, 9, 10, 11, 12], ((7, 8, 9, 10, 11), "length")),
        ([7, 8, END, 9], ((7, 8, END), "stop")),
        ([END], ((END,), "stop")),
        ([7, 8, 9, 10, END], ((7, 8, 9, 10, END), "stop")),
    ],
    ids=["to the end", "end token", "end token at once", "end token as the last"],
)
def test_the_end_token_is_put_back(answer: list[int], expected: tuple[tuple[int, ...], str], streaming: bool) -> None:
    [completion] = complete(Answers({(1, 5): answer}), [request((1, 5))], streaming=streaming)
    assert outcome(completion) == expected and completion.prompt == (1, 5)


def test_other_end_tokens_are_stop_words_there_and_end_tokens_here() -> None:
    session = Answers({(1,): [7, 3, 8]})
    [completion] = complete(session, [request((1,), end_ids=frozenset({END, 3, 4}))])
    assert outcome(completion) == ((7, 3), "stop")
    decoding = session.asked[0][1]
    assert (decoding.end_id, decoding.stop_ids) == (END, ((3,), (4,)))


def test_without_an_end_token_nothing_is_put_back() -> None:
    session = Answers({(1,): [7, 8]})
    [completion] = complete(session, [request((1,), end_ids=frozenset())], pad=NO_END)
    assert completion.token_ids == (7, 8) and session.asked[0][1].end_id == NO_END


def test_batches_are_no_larger_than_the_engine_allows() -> None:
    prompts = [(1, index) for index in range(10, 17)]
    session = Answers({prompt: [prompt[1], 20, END] for prompt in prompts})
    completions = complete(session, [request(prompt, index) for index, prompt in enumerate(prompts)], batch=3)
    assert [len(asked) for asked, _ in session.asked] == [3, 3, 1]
    assert [completion.prompt for completion in completions] == prompts
    assert [completion.token_ids for completion in completions] == [(index, 20, END) for _, index in prompts]


def test_prompt_logits_come_one_prompt_at_a_time() -> None:
    got: dict[int, Tensor] = {}

    def keep(index: int, start: int, logits_TV: Tensor) -> None:
        assert start == 0
        got[index] = logits_TV

    session = Answers({(1, 5): [7], (3,): [8]}, gathers_logits=True)
    requests = [request((1, 5), prompt_logits=True), request((3,), 1, prompt_logits=True)]
    complete(session, requests, listeners=Listeners(on_prompt_logits=keep), streaming=True)
    assert [asked for asked, _ in session.asked] == [[(1, 5)], [(3,)]]
    assert {index: tuple(logits.shape) for index, logits in got.items()} == {0: (2, 6), 1: (1, 6)}


def test_logits_that_nobody_asked_for_are_dropped() -> None:
    def refuse(index: int, start: int, logits_TV: Tensor) -> None:
        raise AssertionError

    session = Answers({(1, 5): [7], (3,): [8]}, gathers_logits=True)
    complete(session, [request((1, 5)), request((3,), 1)], listeners=Listeners(on_prompt_logits=refuse))
    assert [len(asked) for asked, _ in session.asked] == [1, 1]


@pytest.fixture(scope="module")
def tokenizer(tiny: Model) -> Tokenizer:
    return Tokenizer(tiny.hf_dir)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_and_pieces_are_those_of_the_tokens(tokenizer: Tokenizer, streaming: bool) -> None:
    ids = tokenizer.encode_bare("the sea is the sea")
    pieces: list[str] = []
    [completion] = complete(
        Answers({(1,): [*ids, END]}),
        [request((1,), new=40)],
        tokenizer=tokenizer,
        streaming=streaming,
        listeners=Listeners(on_piece=lambda index, piece: pieces.append(piece)),
    )
    assert completion.text == tokenizer.decode(ids) == "".join(pieces)
    assert completion.token_ids == (*ids, END) and (len(pieces) > 1)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("end", [END, NO_END])
def test_a_stop_word_ends_the_text_before_it(tokenizer: Tokenizer, streaming: bool, end: int) -> None:
    ids = tokenizer.encode_bare("the sea is the sky")
    [completion] = complete(
        Answers({(1,): ids}),
        [request((1,), new=40, end_ids=frozenset({end} - {NO_END}), stop_words=("is",))],
        pad=end,
        tokenizer=tokenizer,
        streaming=streaming,
    )
    assert completion.text.strip() == "the sea" and completion.finish_reason == "stop"
    assert len(completion.token_ids) < len(ids) and end not in completion.token_ids


def test_a_sequence_that_tensorrt_ended_at_a_stop_word_did_not_come_to_its_end_token(tokenizer: Tokenizer) -> None:
    [word] = word_ids(["sea"], tokenizer)[:1]
    session = Answers({(1,): [20, *word]})
    [completion] = complete(session, [request((1,), new=40, stop_words=("sea",))], tokenizer=tokenizer)
    assert completion.finish_reason == "stop" and completion.token_ids[-1] != END


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (1.0, 1, 0.0)),
        ({"temperature": 0.0}, (1.0, 1, 0.0)),
        ({"top_k": 1, "temperature": 0.7}, (1.0, 1, 0.0)),
        ({"temperature": 0.7}, (0.7, 0, 1.0)),
        ({"top_p": 0.9}, (1.0, 0, 0.9)),
        ({"top_k": 5}, (1.0, 5, 0.0)),
        ({"top_k": 5, "top_p": 0.9, "temperature": 2.0}, (2.0, 5, 0.9)),
    ],
)
def test_sampling_in_tensorrts_terms(flags: dict[str, Any], expected: tuple[float, int, float]) -> None:
    assert plan_choice(plan_sampling(**flags)) == expected


@given(st.none() | st.floats(0, 4), st.none() | st.integers(0, 100), st.none() | st.floats(0, 1))
def test_drawing_is_never_turned_into_its_opposite(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    sampling = plan_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    _, k, p = plan_choice(sampling)
    assert (k == 1 or (k == 0 and p == 0)) == sampling.greedy


def test_penalty_and_seed_are_passed_on() -> None:
    decoding = plan_decoding(request((1,), sampling=plan_sampling(repetition_penalty=1.3, seed=7)), END, ())
    assert (decoding.repetition_penalty, decoding.random_seed, decoding.max_new_tokens) == (1.3, 7, 5)


def test_the_rest_of_the_sampling_is_passed_on() -> None:
    sampling = plan_sampling(temperature=1.0, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.25)
    decoding = plan_decoding(request((1,), sampling=sampling, bad_words=((3, 4), (5,))), END, (), 3)
    assert (decoding.min_p, decoding.presence_penalty, decoding.frequency_penalty) == (0.1, 0.5, -0.25)
    assert (decoding.bad_ids, decoding.num_return_sequences) == (((3, 4), (5,)), 3)
    greedy = plan_decoding(request((1,), sampling=plan_sampling(temperature=0.0, min_p=0.1)), END, ())
    assert (greedy.top_k, greedy.min_p) == (1, 0.0)


@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"gathers_logits": True}])
def test_several_sequences_of_a_prompt(options: dict[str, bool]) -> None:
    """As many prompts at a time as their sequences fit into the batch, the logits of each once."""
    prompts = [(1, index) for index in range(10, 13)]
    gathers, told = options.pop("gathers_logits", False), list[int]()
    session = Answers({prompt: [prompt[1], 20, END] for prompt in prompts}, gathers_logits=gathers)
    requests = [request(prompts[index // 2], index, prompt_logits=index % 2 == 0) for index in range(6)]
    listeners = Listeners(on_prompt_logits=lambda index, start, logits_TV: told.append(index))
    completions = complete(session, requests, batch=5, num_return_sequences=2, listeners=listeners, **options)  # type: ignore[arg-type]
    assert [completion.prompt[1] for completion in completions] == [10, 10, 11, 11, 12, 12]
    assert [completion.token_ids for completion in completions] == [(index // 2 + 10, 20, END) for index in range(6)]
    assert [len(asked) for asked, _ in session.asked] == ([1, 1, 1] if gathers else [2, 1])
    assert told == ([0, 2, 4] if gathers else [])


@pytest.mark.parametrize(
    ("counts_prompt", "flags", "said"),
    [(True, {"presence_penalty": 1.0}, True), (True, {}, False), (False, {"presence_penalty": 1.0}, False)],
)
def test_an_old_tensorrt_counts_the_prompt(
    counts_prompt: bool, flags: dict[str, Any], said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        complete(Answers({(1,): [7]}, counts_prompt=counts_prompt), [request((1,), sampling=plan_sampling(**flags))])
    assert ("before 1.2 counts the prompt's tokens" in caplog.text) == said


def test_a_limit_of_tensorrt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        complete(Answers({(1,): [7]}), [request((1,), sampling=plan_sampling(top_k=2000))])
    assert "--top_k 2000: TensorRT-LLM chooses among 1024 at most" in caplog.text
