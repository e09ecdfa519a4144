"""One request's choices, step by step: alone or in company, with what it said before, and what is noted of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.errors import ArcticTrtError
from arctic_trt.runtime.chooser import Chooser, TokenLogprobs, choose_tokens
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling, plan_sampling

VOCABULARY, STEPS = 53, 6


def request(index: int = 0, prompt: tuple[int, ...] = (1, 2), **options: Any) -> Request:
    return Request(index=index, prompt=prompt, max_new_tokens=9, **{"sampling": Sampling(), **options})


requests = st.builds(
    lambda seed, bad_words, logprobs, **flags: request(
        bad_words=tuple(map(tuple, bad_words)), logprobs=logprobs, sampling=plan_sampling(seed=seed, **flags)
    ),
    st.integers(0, 5),
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=2),
    st.none() | st.integers(0, 4),
    temperature=st.none() | st.floats(0, 3),
    top_k=st.none() | st.integers(0, 60),
    top_p=st.none() | st.floats(0, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.none() | st.floats(0.5, 2),
    presence_penalty=st.none() | st.floats(-2, 2),
    frequency_penalty=st.none() | st.floats(-2, 2),
)


def say(chooser: Chooser, logits_TV: Tensor, prompt: tuple[int, ...] = (1, 2)) -> list[int]:
    """Tokens chosen one after the other from the rows."""
    tokens = list(prompt)
    for logits_V in logits_TV:
        (token,) = choose_tokens(logits_V[None], [chooser], [tokens])
        if isinstance(token, ArcticTrtError):
            raise token
        tokens.append(token)
    return tokens[len(prompt) :]


@settings(deadline=None)
@given(st.lists(requests, min_size=1, max_size=6), st.integers(0, 100))
def test_company_changes_no_bit(asked: list[Request], seed: int) -> None:
    logits_TWV = torch.randn(STEPS, len(asked), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    choosers, tokens = [Chooser(one) for one in asked], [[1, 2] for _ in asked]
    for logits_WV in logits_TWV:
        for sequence, token in zip(tokens, choose_tokens(logits_WV, choosers, tokens), strict=True):
            sequence.append(token)
    for row, one in enumerate(asked):
        alone = Chooser(one)
        assert say(alone, logits_TWV[:, row].clone()) == tokens[row][2:]
        assert alone.logprobs == choosers[row].logprobs


def test_the_seed_and_the_index_decide() -> None:
    logits_TV = torch.zeros(12, VOCABULARY)

    def drawn(seed: int, index: int) -> tuple[int, ...]:
        return tuple(say(Chooser(request(index, sampling=plan_sampling(temperature=1.0, seed=seed))), logits_TV))

    assert drawn(3, 4) == drawn(3, 4)
    assert len({drawn(seed, index) for seed in range(3) for index in range(3)}) == 9


def test_repetition_counts_the_prompt_and_presence_and_frequency_do_not() -> None:
    logits_TV = torch.zeros(4, VOCABULARY)
    logits_TV[:, [1, 7, 8]] = torch.tensor([4.0, 3.0, 2.5])  # 1 is in the prompt
    said = {
        name: say(Chooser(request(sampling=plan_sampling(**{name: value}))), logits_TV)  # type: ignore[arg-type]
        for name, value in {"repetition_penalty": 100.0, "presence_penalty": 1.2, "frequency_penalty": 0.6}.items()
    }
    assert said["repetition_penalty"][:2] == [7, 8]
    assert said["presence_penalty"] == [1, 7, 1, 1]
    assert said["frequency_penalty"] == [1, 1, 7, 1]


@settings(deadline=None)
@given(st.integers(0, 50), st.floats(-2, 2), st.floats(-2, 2), st.floats(0.3, 3))
def test_what_is_kept_from_step_to_step_is_what_a_count_of_all_tokens_gives(
    seed: int, presence: float, frequency: float, repetition: float
) -> None:
    """As OpenAI's documentation has the formula, with Hugging Face's repetition penalty in front of it."""
    logits_TV = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    sampling = plan_sampling(presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition)
    prompt, output = (1, 2), say(Chooser(request(sampling=sampling)), logits_TV)
    for step, logits_V in enumerate(logits_TV.double()):
        counts = torch.bincount(torch.tensor(output[:step], dtype=torch.int64), minlength=6)
        seen = torch.bincount(torch.tensor([*prompt, *output[:step]]), minlength=6) > 0
        scores = torch.where(seen, torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition), logits_V)
        scores = scores - counts * frequency - (counts > 0) * presence
        assert scores[output[step]] >= scores.max() - 1e-5


def test_bad_words_need_their_whole_beginning() -> None:
    logits_TV = torch.zeros(3, VOCABULARY)
    logits_TV[:, [9, 5, 4]] = torch.tensor([3.0, 2.0, 1.0])
    assert say(Chooser(request(bad_words=((9,),))), logits_TV) == [5, 5, 5]
    assert say(Chooser(request(bad_words=((9, 9),))), logits_TV) == [9, 5, 9]
    assert say(Chooser(request(bad_words=((2, 9),))), logits_TV) == [5, 9, 9], "the prompt may begin it"
    assert say(Chooser(request(bad_words=((1, 9), (2, 2, 9), (1, 2, 5, 9)))), logits_TV) == [9, 9, 9]
    drawn = say(Chooser(request(bad_words=((9,), (5,)), sampling=plan_sampling(temperature=0.1))), logits_TV.repeat(20, 1))
    assert set(drawn) == {4}


@pytest.mark.parametrize("sampling", [plan_sampling(), plan_sampling(temperature=1.0)])
def test_bad_words_that_leave_nothing(sampling: Sampling) -> None:
    chooser = Chooser(request(3, bad_words=tuple((token,) for token in range(VOCABULARY)), sampling=sampling))
    with pytest.raises(ArcticTrtError, match="bad words of prompt 3 leave no token"):
        say(chooser, torch.zeros(1, VOCABULARY))


@pytest.mark.parametrize("count", [0, 3, 99])
def test_logprobs_are_of_the_models_own_logits(count: int) -> None:
    logits_TV = torch.randn(STEPS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    sampling = plan_sampling(temperature=0.3, top_k=5, repetition_penalty=1.7, presence_penalty=1.0)
    chooser = Chooser(request(sampling=sampling, logprobs=count, bad_words=((4,),)))
    tokens, expected_TV = say(chooser, logits_TV), logits_TV.log_softmax(-1)
    assert chooser.logprobs is not None and [one.token for one in chooser.logprobs] == tokens
    for one, expected_V in zip(chooser.logprobs, expected_TV, strict=True):
        assert one.logprob == pytest.approx(float(expected_V[one.token]), abs=1e-5)
        values, ids = expected_V.topk(min(count, VOCABULARY))
        assert [token for token, _ in one.top] == ids.tolist()
        assert np.allclose([value for _, value in one.top], values, atol=1e-5)


def test_logprobs_of_the_likeliest_and_none_where_none_are_wanted() -> None:
    chooser = Chooser(request(logprobs=1))
    say(chooser, torch.tensor([[0.0, 0.0, 1.0]]))
    norm = float(torch.tensor([0.0, 0.0, 1.0]).logsumexp(0))
    [found] = chooser.logprobs or ()
    assert isinstance(found, TokenLogprobs) and found.top == ((2, pytest.approx(1 - norm)),)
    silent = Chooser(request())
    say(silent, torch.zeros(1, 3))
    assert silent.logprobs is None
