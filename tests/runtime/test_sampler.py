"""Greedy and random choices: examples by hand, properties by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.errors import UsageError
from arctic_trt.runtime.sampler import Sampling, choose, nucleus, penalize, plan_sampling, probabilities, request_generator

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0])
logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(torch.tensor)
samplings = st.builds(
    Sampling,
    temperature=st.none() | st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.01, 1),
    repetition_penalty=st.floats(0.5, 2),
)


def draw(sampling: Sampling, count: int, seed: int = 0) -> list[int]:
    generator = request_generator(seed, 0)
    return [choose(LOGITS, sampling, [], generator) for _ in range(count)]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 1, "temperature": 9.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"temperature": 0.0, "top_p": 0.9},
    ],
)
def test_greedy(flags: dict[str, float]) -> None:
    sampling = plan_sampling(**flags)
    assert sampling.greedy and sampling.is_argmax
    assert set(draw(sampling, 5)) == {1}


@pytest.mark.parametrize("flags", [{"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.9}, {"top_k": 0, "temperature": 0.5}])
def test_not_greedy(flags: dict[str, float]) -> None:
    assert not plan_sampling(**flags).greedy
    assert len(set(draw(plan_sampling(**flags), 200))) > 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"top_k": -1}, "--top_k -1"),
        ({"top_p": 1.5}, "--top_p 1.5"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0"),
        ({"seed": -3}, "--random_seed -3"),
        ({"temperature": float("nan")}, "--temperature nan"),
    ],
)
def test_out_of_range(flags: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        plan_sampling(**flags)


def test_frequencies_follow_the_softmax() -> None:
    tokens = torch.tensor(draw(Sampling(temperature=1.5), 20000))
    found = torch.bincount(tokens, minlength=5) / len(tokens)
    torch.testing.assert_close(found, (LOGITS / 1.5).softmax(-1), atol=0.015, rtol=0)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    assert penalize(LOGITS, [1, 1, 2], 2.0).tolist() == [1.0, 1.5, -4.0, 2.5, 0.0]
    assert choose(LOGITS, Sampling(repetition_penalty=2.0), [1], request_generator(0, 0)) == 3


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    share = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert nucleus(share, 0.39).tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(nucleus(share, 0.5), torch.tensor([0, 4 / 7, 3 / 7, 0]))
    torch.testing.assert_close(nucleus(share, 1.0), share)


@given(logits, samplings)
def test_a_distribution_over_the_likeliest(logits_V: Tensor, sampling: Sampling) -> None:
    share_V = probabilities(logits_V, sampling)
    assert share_V.shape == logits_V.shape and bool((share_V >= 0).all())
    assert float(share_V.sum()) == pytest.approx(1, abs=1e-5)
    kept = share_V > 0
    assert 1 <= int(kept.sum()) <= (sampling.top_k or len(logits_V))
    assert float(logits_V[kept].min()) >= float(logits_V[~kept].max() if bool((~kept).any()) else -torch.inf) - 60


@given(logits, samplings, st.integers(0, 2**40), st.integers(0, 1000))
def test_a_choice_depends_on_seed_and_index_alone(logits_V: Tensor, sampling: Sampling, seed: int, index: int) -> None:
    history = list(range(len(logits_V)))[::2]
    first = choose(logits_V, sampling, history, request_generator(seed, index))
    torch.manual_seed(0)
    assert choose(logits_V, sampling, history, request_generator(seed, index)) == first
    assert 0 <= first < len(logits_V)


def test_requests_have_generators_of_their_own() -> None:
    draws = {tuple(torch.rand(3, generator=request_generator(seed, index)).tolist()) for seed in range(3) for index in range(3)}
    assert len(draws) == 9
