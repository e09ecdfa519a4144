"""Perplexity, divergence, agreement and distance, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.evaluate.scores import Scores, join_scores, next_tokens, relative_error, score, summarize

SEEDS = st.integers(0, 2**20)


def logits(seed: int, tokens: int = 5, vocab: int = 7, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def test_next_tokens_end_with_their_sample() -> None:
    batches = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8]])]
    assert next_tokens(batches).tolist() == [2, 3, -1, 5, 6, -1, 8, -1]


def test_numbers_by_hand() -> None:
    mine, theirs = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])
    found = score(mine, torch.tensor([1]), theirs)
    assert found.nll_T.item() == pytest.approx(-math.log(0.75), rel=1e-6)
    assert found.kl_T is not None
    assert found.kl_T.item() == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), rel=1e-6)
    summary = summarize(found)
    assert summary["perplexity"] == pytest.approx(4 / 3, rel=1e-6)
    assert summary["top1_agreement"] == 0.0, "a tie's first is the reference's likeliest, the other is ours"


@given(SEEDS)
def test_nothing_is_apart_from_itself(seed: int) -> None:
    x = logits(seed)
    summary = summarize(score(x, torch.zeros(5, dtype=torch.int64), x))
    assert summary["kl_mean"] == summary["kl_max"] == 0.0 and summary["top1_agreement"] == 1.0


@given(SEEDS, SEEDS)
def test_divergence_is_torchs(first: int, second: int) -> None:
    mine, theirs = logits(first), logits(second)
    found = score(mine, torch.zeros(5, dtype=torch.int64), theirs).kl_T
    wanted = torch.nn.functional.kl_div(
        mine.double().log_softmax(-1), theirs.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert found is not None and (found >= 0).all()
    assert torch.allclose(found, wanted, atol=1e-6)


@given(SEEDS, st.integers(1, 4))
def test_parts_make_the_whole(seed: int, cut: int) -> None:
    mine, theirs, target = logits(seed), logits(seed + 1), torch.arange(5)
    whole = score(mine, target, theirs)
    joined = join_scores([score(mine[rows], target[rows], theirs[rows]) for rows in (slice(0, cut), slice(cut, 5))])
    assert summarize(joined) == summarize(whole)


def test_what_was_not_measured_is_none() -> None:
    summary = summarize(join_scores([Scores(torch.tensor([1.0], dtype=torch.float64))]))
    assert summary["perplexity"] == pytest.approx(math.e)
    assert summary["kl_mean"] is summary["kl_p99"] is summary["top1_agreement"] is None


def test_hopeless_models_have_a_perplexity_too() -> None:
    assert summarize(Scores(torch.tensor([1e6], dtype=torch.float64)))["perplexity"] == math.inf


def test_tails() -> None:
    kl = torch.arange(1000, dtype=torch.float64).flip(0)
    summary = summarize(Scores(torch.ones(1000, dtype=torch.float64), kl, torch.ones(1000, dtype=torch.float64)))
    assert summary["kl_p99"] == 989.0 and summary["kl_max"] == 999.0


def test_errors_are_relative_to_each_token() -> None:
    reference = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    found = relative_error(reference + torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.0, 0.0]]), reference)
    assert found.tolist() == pytest.approx([0.1, 0.001, 0.0])
