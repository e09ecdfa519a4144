"""Greedy and random choices: examples by hand, properties by hypothesis, and Hugging Face's processors as a second opinion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from arctic_trt.errors import UsageError
from arctic_trt.runtime.sampler import (
    BLOCK,
    Floats,
    Sampling,
    candidates,
    draw,
    forbidden_next,
    likeliest,
    log_sum_exp,
    nucleus,
    penalize_counts,
    penalize_seen,
    plan_sampling,
    request_generator,
    top,
)

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0], np.float32)


def row(values: list[float]) -> Floats:
    return np.array(values, np.float32)


logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(row)
unlike = st.permutations(range(-12, 12)).map(lambda values: row([0.37 * value for value in values]))
"""Without ties, where everybody agrees."""
samplings = st.builds(
    Sampling,
    temperature=st.none() | st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0.01, 1),
)


def distribution(logits_V: Floats, sampling: Sampling) -> Floats:
    """Probabilities [V] of what is drawn."""
    ids, weights = candidates(logits_V, sampling)
    shares = np.zeros(len(logits_V))
    shares[ids] = weights / weights.sum(dtype=np.float64)
    return shares


def reference(processors: list[Any], logits_V: Floats, ids: list[int]) -> Floats:
    """Scores [V] after Hugging Face's processors."""
    scores = torch.from_numpy(logits_V.copy())[None]
    for processor in processors:
        scores = processor(torch.tensor([ids], dtype=torch.int64), scores)
    found: Floats = scores[0].numpy()
    return found


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"temperature": 0.0},
        {"top_k": 1, "temperature": 9.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 0.0},
        {"min_p": 1.0, "temperature": 2.0},
        {"temperature": 0.0, "top_p": 0.9},
    ],
)
def test_greedy(flags: dict[str, Any]) -> None:
    sampling = plan_sampling(**flags)
    assert sampling.greedy and sampling.is_argmax


@pytest.mark.parametrize(
    "flags", [{"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 0, "temperature": 0.5}]
)
def test_not_greedy(flags: dict[str, Any]) -> None:
    sampling, generator = plan_sampling(**flags), request_generator(0, 0)
    assert not sampling.greedy
    assert len({draw(*candidates(LOGITS, sampling), generator) for _ in range(200)}) > 1


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_greedy_with_a_penalty_is_not_the_largest_as_it_comes(name: str) -> None:
    sampling = plan_sampling(**{name: 1.5})  # type: ignore[arg-type]
    assert sampling.greedy and sampling.penalizes and not sampling.is_argmax
    assert not plan_sampling(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0).penalizes


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": float("inf")}, "--temperature inf is out of range, expected a finite number"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"top_k": -1}, "--top_k -1"),
        ({"top_p": 1.5}, "--top_p 1.5"),
        ({"min_p": -0.5}, "--min_p -0.5 is out of range, expected between 0 and 1"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty 0.0"),
        ({"presence_penalty": 2.5}, "--presence_penalty 2.5 is out of range, expected between -2 and 2"),
        ({"frequency_penalty": -3.0}, "--frequency_penalty -3.0"),
        ({"seed": -3}, "--random_seed -3"),
    ],
)
def test_out_of_range(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        plan_sampling(**flags)


@given(logits, samplings)
@example(np.array([-5e-41, 0.0], np.float32), Sampling(top_p=0.5))  # different logits, equal weights: the first stays
def test_candidates_are_the_likeliest(logits_V: Floats, sampling: Sampling) -> None:
    shares = distribution(logits_V, sampling)
    kept = shares > 0
    assert shares.sum() == pytest.approx(1) and 1 <= kept.sum() <= (sampling.top_k or len(logits_V))
    assert shares[logits_V >= logits_V.max() - 1e-4].max() == shares.max()
    ids, weights = candidates(logits_V, sampling)
    assert weights.max() == 1 and len(set(ids.tolist())) == len(ids)
    left_out = np.setdiff1d(np.arange(len(logits_V)), ids)
    assert not len(left_out) or logits_V[left_out].max() <= logits_V[ids].min() + 1e-4


@settings(deadline=None)
@given(unlike, st.floats(0.05, 4), st.integers(1, 30), st.floats(0.02, 0.99), st.floats(0.01, 0.9))
def test_hugging_face_draws_from_the_same(logits_V: Floats, temperature: float, k: int, p: float, min_p: float) -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = [TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p), MinPLogitsWarper(min_p)]
    flags = [{"temperature": temperature}, {"top_k": k}, {"top_p": p}, {"min_p": min_p}]
    together: dict[str, Any] = {}
    for warper, flag in zip(warpers, flags, strict=True):
        together |= flag
        for chosen, processors in ((flag, [warper]), (together, warpers[: len(together)])):
            theirs = torch.from_numpy(reference(processors, logits_V, [])).softmax(-1).double().numpy()
            ours = distribution(logits_V, plan_sampling(**chosen))
            assume(_clear_of_limits(logits_V, chosen))
            assert np.abs(ours - theirs).max() < 1e-5, chosen


def _clear_of_limits(logits_V: Floats, chosen: dict[str, Any]) -> bool:
    """No sum of probabilities is so near top_p, and none so near min_p, that rounding decides."""
    shares = np.sort(distribution(logits_V, plan_sampling(**{**chosen, "top_p": None, "min_p": None})))[::-1]
    near_p = np.abs(shares.cumsum() - chosen.get("top_p", -1)).min() < 1e-5
    return not near_p and bool(np.abs(shares / shares[0] - chosen.get("min_p", -1)).min() > 1e-5)


@settings(deadline=None)
@given(unlike, st.lists(st.integers(0, 23), min_size=1, max_size=60), st.floats(0.2, 5))
def test_hugging_face_penalizes_repetition_alike(logits_V: Floats, history: list[int], penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    seen, ours = np.isin(np.arange(24), history), logits_V.copy()
    penalize_seen(ours, seen, penalty)
    assert np.allclose(ours, reference([RepetitionPenaltyLogitsProcessor(penalty)], logits_V, history), rtol=1e-6)


@settings(deadline=None)
@given(
    unlike,
    st.lists(st.integers(0, 3), max_size=20),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_hugging_face_forbids_the_same_words(logits_V: Floats, tokens: list[int], words: list[list[int]]) -> None:
    from transformers import NoBadWordsLogitsProcessor

    tokens = [9, 9, 9, *tokens]  # theirs skips a word that is longer than all there is, even if only its last token is missing
    theirs = reference([NoBadWordsLogitsProcessor(words)], logits_V, tokens)
    assert set(forbidden_next(words, tokens)) == set(np.flatnonzero(np.isinf(theirs)).tolist())


@given(logits, st.data())
def test_penalties_of_one_and_nought_change_nothing(logits_V: Floats, data: st.DataObject) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(logits_V), max_size=len(logits_V))), np.int32)
    same = logits_V.copy()
    penalize_seen(same, counts > 0, 1.0)
    penalize_counts(same, counts, 0.0, 0.0)
    assert np.array_equal(same, logits_V)


@given(logits, st.data(), st.floats(-2, 2), st.floats(-2, 2))
def test_presence_is_subtracted_once_and_frequency_by_count(
    logits_V: Floats, data: st.DataObject, presence: float, frequency: float
) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(logits_V), max_size=len(logits_V))), np.int32)
    found = logits_V.copy()
    penalize_counts(found, counts, presence, frequency)
    expected = logits_V.astype(np.float64) - frequency * counts - presence * (counts > 0)
    assert np.allclose(found, expected, atol=1e-5)


def test_the_penalty_of_a_forbidden_token_and_a_huge_one() -> None:
    logits_V = row([-np.inf, -20.0, 3.0])
    penalize_seen(logits_V, np.array([True, True, True]), 1e38)
    assert logits_V[0] == -np.inf and np.isfinite(logits_V[1:]).all() and logits_V[1] < -1e38


def test_nucleus_is_the_smallest_set_that_reaches_p() -> None:
    share = row([0.1, 0.4, 0.3, 0.2])
    assert [sorted(nucleus(share, p).tolist()) for p in (0.0001, 0.39, 0.5, 0.75)] == [[1], [1], [1, 2], [1, 2, 3]]
    assert nucleus(row([0.5, 0.5, 0.5, 0.5]), 0.49).tolist() == [0, 1], "of equals the first"


@given(st.lists(st.floats(2**-12, 1, width=32), min_size=1, max_size=60).map(row), st.floats(0.001, 0.999))
def test_a_nucleus_is_enough_and_no_smaller_one_is(weights: Floats, top_p: float) -> None:
    kept, total = nucleus(weights, top_p), weights.sum(dtype=np.float64)
    inside = weights[kept].sum(dtype=np.float64)
    assert inside >= top_p * total * (1 - 1e-9)
    assert inside - weights[kept].min() < top_p * total * (1 + 1e-9)


@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=30).map(lambda values: row([float(value) for value in values])), st.data()
)
def test_the_largest_of_equals_are_the_first(values: Floats, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 35))
    expected = sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]
    assert sorted(top(values, count).tolist()) == sorted(expected)
    assert likeliest(values, count) == expected and likeliest(values, 0) == []


@given(logits)
def test_log_probabilities(logits_V: Floats) -> None:
    expected = torch.from_numpy(logits_V).double().log_softmax(-1).numpy()
    assert np.allclose(logits_V - log_sum_exp(logits_V), expected, atol=1e-5)


@pytest.mark.parametrize("size", [5, BLOCK, 2 * BLOCK + 7])
def test_draws_follow_the_weights(size: int) -> None:
    """Pearson's chi-square of 20,000 draws with a fixed seed; the weights fall off so that all expected counts are above 5."""
    weights = np.linspace(1, 3, size).astype(np.float32)
    weights[::5] = 0
    generator, ids = request_generator(7, 0), np.arange(size) + 100
    found = np.bincount([draw(ids, weights, generator) - 100 for _ in range(20000)], minlength=size)
    assert not found[::5].any()
    possible = weights > 0
    expected = 20000 * weights[possible] / weights.sum(dtype=np.float64)
    freedom = possible.sum() - 1
    chi_square = ((found[possible] - expected) ** 2 / expected).sum()
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=700).filter(any).map(row), st.sampled_from([0.0, 0.5, 1 - 2**-53])
)
def test_what_weighs_nothing_is_never_drawn(weights: Floats, number: float) -> None:
    class Fixed:
        def random(self) -> float:
            return number

    assert weights[draw(np.arange(len(weights)), weights, Fixed())] > 0  # type: ignore[arg-type]


@given(logits, st.floats(1e-300, 1e-3))
def test_a_temperature_near_nought_is_greedy(logits_V: Floats, temperature: float) -> None:
    assume(len(logits_V) == 1 or np.diff(np.sort(logits_V))[-1] > 0.1)
    found = draw(*candidates(logits_V, plan_sampling(temperature=temperature)), request_generator(0, 0))
    assert found == int(logits_V.argmax())


def test_requests_have_random_streams_of_their_own() -> None:
    draws = {tuple(request_generator(seed, index).random(3)) for seed in range(3) for index in range(3)}
    assert len(draws) == 9
    assert request_generator(2**70, 5).random() == request_generator(2**70, 5).random()
