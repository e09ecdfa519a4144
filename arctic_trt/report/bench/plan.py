"""What a benchmark sends and when, decided before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import UsageError
from arctic_trt.report.bench.workload import BenchPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of a result: so many prompts of ``input_tokens`` (None: as the file has them), all at once or at ``qps``."""

    num_prompts: int
    input_tokens: int | None
    qps: float | None = None

    def __str__(self) -> str:
        length = "of the file" if self.input_tokens is None else f"of {self.input_tokens} tokens"
        when = "" if self.qps is None else f", {self.qps:g} a second"
        return f"{self.num_prompts} prompt{'s' if self.num_prompts > 1 else ''} {length}{when}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request that arrives ``at_s`` seconds after the beginning."""

    at_s: float
    prompt: BenchPrompt
    max_new_tokens: int


def plan_batches(nums_prompts: Sequence[int], lengths: Sequence[int | None]) -> list[Case]:
    """Every number of prompts for every length."""
    return [Case(num_prompts=number, input_tokens=length) for length in lengths for number in nums_prompts]


def plan_rates(rates: Sequence[float], lengths: Sequence[int | None], num_requests: int) -> list[Case]:
    """Every rate for every length."""
    return [Case(num_prompts=num_requests, input_tokens=length, qps=rate) for length in lengths for rate in rates]


def arrive_together(prompts: Sequence[BenchPrompt], max_new_tokens: int) -> list[Arrival]:
    """All at the beginning."""
    return [Arrival(at_s=0.0, prompt=prompt, max_new_tokens=max_new_tokens) for prompt in prompts]


def arrive_at_random(prompts: Sequence[BenchPrompt], max_new_tokens: int, *, qps: float, seed: int) -> list[Arrival]:
    """A Poisson process of ``qps`` requests a second, the first one at the beginning."""
    times = poisson_times(len(prompts), qps, seed)
    return [Arrival(at_s=at_s, prompt=prompt, max_new_tokens=max_new_tokens) for at_s, prompt in zip(times, prompts, strict=True)]


def poisson_times(count: int, qps: float, seed: int) -> list[float]:
    """Seconds at which ``count`` requests arrive; one seed gives the same pattern at every rate, only faster or slower."""
    gaps = np.random.default_rng(seed).exponential(size=max(0, count - 1))
    return [0.0, *(np.cumsum(gaps) / qps).tolist()][:count]


def check_fits(longest_prompt: int, max_new_tokens: int, limits: BuildConfig) -> None:
    """Raise :class:`UsageError` for prompts or outputs that the engine was not built for."""
    if longest_prompt > limits.max_input_len:
        raise UsageError(
            f"A prompt has {longest_prompt} tokens, the engine was built for --max_input_len {limits.max_input_len}.",
            "Give a smaller -l.",
        )
    if longest_prompt + max_new_tokens > limits.max_seq_len:
        raise UsageError(
            f"A prompt of {longest_prompt} tokens with --max_new_tokens {max_new_tokens} exceeds the engine's --max_seq_len "
            f"{limits.max_seq_len}.",
            "Give a smaller -l or --max_new_tokens.",
        )
