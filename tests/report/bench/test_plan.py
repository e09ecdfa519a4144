"""Cases, arrivals, and what an engine's limits refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.report.bench.plan import (
    Case,
    arrive_at_random,
    arrive_together,
    check_fits,
    plan_batches,
    plan_rates,
    poisson_times,
)
from arctic_trt.report.bench.workload import BenchPrompt

LIMITS = BuildConfig(max_batch_size=2, max_input_len=50, max_seq_len=60, max_num_tokens=8, max_beam_width=1)


def test_every_number_for_every_length() -> None:
    assert plan_batches([1, 4], [64, 128]) == [
        Case(num_prompts=number, input_tokens=length) for length in (64, 128) for number in (1, 4)
    ]
    assert plan_rates([0.5], [64], 9) == [Case(num_prompts=9, input_tokens=64, qps=0.5)]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(num_prompts=1, input_tokens=64), "1 prompt of 64 tokens"),
        (Case(num_prompts=8, input_tokens=None), "8 prompts of the file"),
        (Case(num_prompts=20, input_tokens=64, qps=0.5), "20 prompts of 64 tokens, 0.5 a second"),
    ],
)
def test_a_case_in_words(case: Case, words: str) -> None:
    assert str(case) == words


@pytest.mark.parametrize("qps", [0.5, 4.0, 100.0])
def test_arrivals_are_a_poisson_process(qps: float) -> None:
    """Gaps with the mean and the spread of an exponential, independent of each other; counts as variable as their mean."""
    times = np.array(poisson_times(20_001, qps, seed=3))
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / qps, rel=0.03)
    assert gaps.std() == pytest.approx(1 / qps, rel=0.04)
    assert (gaps > 1 / qps).mean() == pytest.approx(np.exp(-1), abs=0.015)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    counts = np.histogram(times, np.arange(0, times[-1], 10 / qps))[0]
    assert counts.var() == pytest.approx(counts.mean(), rel=0.12)


@given(st.integers(0, 50), st.floats(0.01, 1000), st.integers(0, 9))
def test_one_seed_gives_one_pattern_at_every_rate(count: int, qps: float, seed: int) -> None:
    times, unit = poisson_times(count, qps, seed), poisson_times(count, 1.0, seed)
    assert len(times) == count and times == sorted(times)
    assert np.allclose(np.array(times) * qps, unit)
    if count > 2:
        assert poisson_times(count, qps, seed + 1) != times


def test_arrivals_keep_their_prompts() -> None:
    prompts = [BenchPrompt((index,)) for index in range(4)]
    together, apart = arrive_together(prompts, 7), arrive_at_random(prompts, 7, qps=2, seed=0)
    assert [arrival.prompt for arrival in together] == [arrival.prompt for arrival in apart] == prompts
    assert {arrival.at_s for arrival in together} == {0.0} and {arrival.max_new_tokens for arrival in apart} == {7}
    assert [arrival.at_s for arrival in apart] == poisson_times(4, 2, 0)


def test_what_fits_the_engine_and_what_does_not() -> None:
    check_fits(50, 10, LIMITS)
    with pytest.raises(UsageError, match=r"A prompt has 51 tokens, .*--max_input_len 50.*smaller -l"):
        check_fits(51, 1, LIMITS)
    with pytest.raises(UsageError, match=r"50 tokens with --max_new_tokens 11 exceeds the engine's --max_seq_len 60"):
        check_fits(50, 11, LIMITS)
