"""What the device chooses is what the sampler chooses: its twin of plain torch, and the kernel as the interpreter runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="there is no Triton for this machine")

from arctic_trt.runtime.chooser import Chooser
from arctic_trt.runtime.cuda.choose import ChosenTokens, choose_row
from arctic_trt.runtime.cuda.triton_ops import TritonOps
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.outcome import BROKEN
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import plan_sampling
from arctic_trt.runtime.step import LIKELIEST, Choice
from tests.support.triton_interpreter import use_exact_arithmetic

if DEVICE == "cpu":
    use_exact_arithmetic()

VOCABULARY = 97
flags = st.fixed_dictionaries(
    {
        "temperature": st.none() | st.sampled_from([0.0, 1e-40, 0.3, 1.0, 7.0]),
        "top_k": st.none() | st.sampled_from([1, 2, 5, 40, 96, 97, 2**40]),
        "top_p": st.none() | st.floats(0, 1) | st.sampled_from([0.5, 0.9, 1.0]),
        "min_p": st.none() | st.floats(0, 1) | st.sampled_from([0.05]),
    }
)
kinds = st.sampled_from(["continuous", "with equals", "all equal", "one above all", "zeros of both signs"])


def row_of(kind: str, seed: int, vocabulary: int = VOCABULARY) -> Tensor:
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 4
    if kind == "continuous":
        return logits_V
    if kind == "with equals":
        return (logits_V / 2).round() * 2
    if kind == "all equal":
        return torch.full((vocabulary,), -3.0)
    if kind == "one above all":
        return torch.where(torch.arange(vocabulary) == seed % vocabulary, 300.0, logits_V)
    return torch.where(logits_V > 4, logits_V, torch.where(logits_V > 0, 0.0, -0.0))


def chooser(seed: int, given_flags: dict[str, float | None]) -> Chooser:
    sampling = plan_sampling(seed=seed, **given_flags)  # type: ignore[arg-type]
    return Chooser(Request(index=0, prompt=(1,), max_new_tokens=9, sampling=sampling))


def chosen_by_kernel(logits_WV: Tensor, choices: list[Choice], rows: list[int]) -> list[int]:
    token_K = torch.full((len(rows),), -7, dtype=torch.int32, device=DEVICE)
    choice_KF = torch.tensor(choices, dtype=torch.float64, device=DEVICE)
    TritonOps().choose(logits_WV.to(DEVICE), torch.tensor(rows, dtype=torch.int32, device=DEVICE), choice_KF, token_K)
    return token_K.tolist()


@settings(deadline=None, max_examples=300)
@given(flags, kinds, st.integers(0, 2**20))
def test_the_twin_chooses_as_the_sampler_does_with_the_same_seed(
    given_flags: dict[str, float | None], kind: str, seed: int
) -> None:
    logits_V = row_of(kind, seed)
    ours, theirs = chooser(seed, given_flags), chooser(seed, given_flags)
    for _ in range(3):
        assert ours.by_ranks and choose_row(logits_V, ours.next_choice()) == theirs.choose(logits_V.numpy(), [1])


@pytest.mark.parametrize("kind", ["continuous", "with equals", "zeros of both signs"])
def test_the_kernel_chooses_as_the_twin_does(kind: str) -> None:
    """In several parts of a row, which are no powers of two."""
    draws = np.random.default_rng(5)
    asked: list[dict[str, float | None]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 3},
        {"top_k": 40, "top_p": 0.6},
        {"top_p": 0.9, "temperature": 2.0},
        {"top_p": 0.95, "min_p": 0.1},
        {"min_p": 0.02, "top_k": 96},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
    ]
    logits_WV = torch.stack([row_of(kind, int(seed)) for seed in draws.integers(0, 999, 5)])
    rows = draws.integers(0, 5, len(asked)).tolist()
    choices = [chooser(int(draws.integers(0, 999)), each).next_choice() for each in asked]
    wanted = [choose_row(logits_WV[row], choice) for row, choice in zip(rows, choices, strict=True)]
    assert chosen_by_kernel(logits_WV, choices, rows) == wanted


def test_equally_likely_tokens_are_drawn_in_the_order_of_their_ids() -> None:
    """Ties at both limits: of nine alike ``top_k`` keeps the first six, and ``top_p`` the first three of these."""
    logits_V = torch.zeros(9)
    choices = [Choice(top_k=6, top_p=0.5, uniform=uniform) for uniform in (0.0, 0.33, 0.34, 0.67, 0.999)]
    assert [choose_row(logits_V, choice) for choice in choices] == [0, 0, 1, 2, 2]
    assert chosen_by_kernel(logits_V[None], choices, [0] * 5) == [0, 0, 1, 2, 2]


def test_those_at_the_limit_come_after_those_above_it() -> None:
    """As the sampler lists candidates, by which a random number falls on one or the other."""
    logits_V = torch.tensor([0.0, 5.0, 0.0, 5.0])
    choices = [Choice(top_k=3, temperature=50.0, uniform=uniform) for uniform in (0.1, 0.5, 0.9)]
    assert [choose_row(logits_V, choice) for choice in choices] == [1, 3, 0]
    assert chosen_by_kernel(logits_V[None], choices, [0] * 3) == [1, 3, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_have_no_token(value: float) -> None:
    logits_WV = torch.zeros(2, 70)
    logits_WV[1, 66] = value
    choices = [LIKELIEST, LIKELIEST, Choice(uniform=0.999)]
    assert chosen_by_kernel(logits_WV, choices, [0, 1, 1]) == [0, BROKEN, BROKEN]
    assert [choose_row(logits_WV[row], choice) for row, choice in zip([0, 1, 1], choices, strict=True)] == [0, BROKEN, BROKEN]


def test_a_part_of_wider_rows() -> None:
    """Ranks that share out a vocabulary which they do not divide have columns that mean nothing."""
    wide_WV = torch.randn(3, 80)
    wide_WV[:, 70:] = 99.0
    assert chosen_by_kernel(wide_WV[:, :70], [LIKELIEST] * 3, [0, 1, 2]) == wide_WV[:, :70].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_looked_up_among_those_that_were_chosen(dtype: torch.dtype) -> None:
    rows_VD = torch.randn(6, 72, device=DEVICE).to(dtype)
    token_T = torch.tensor([0, -1, 5, -3, 9, -2], dtype=torch.int32, device=DEVICE)
    chosen_K = torch.tensor([7, BROKEN, 8], dtype=torch.int32, device=DEVICE)
    expected_TD = torch.zeros(6, 72, device=DEVICE)
    for place, token in enumerate([0, 7, 5, 8, 9, BROKEN]):
        if 4 <= token < 10:
            expected_TD[place] = rows_VD[token - 4].float()
    for ops in (TwinOps(), TritonOps()):
        assert torch.equal(ops.embed(token_T, chosen_K, rows_VD, 4), expected_TD)


def test_tokens_of_two_steps_are_on_their_way_at_a_time() -> None:
    chosen = ChosenTokens(3, torch.device(DEVICE))
    chosen.token_K.copy_(torch.tensor([1, 2, 3]))
    first = chosen.bring(3)
    chosen.token_K.copy_(torch.tensor([4, 5, 6]))
    second = chosen.bring(2)
    assert (first.wait(), second.wait()) == ([1, 2, 3], [4, 5])
