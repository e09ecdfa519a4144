"""Scores are sums of log-probabilities, in whatever parts the logits come, and whoever shares a context."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.engine.config import BuildConfig
from arctic_trt.errors import ArcticTrtError, UsageError
from arctic_trt.runtime.batcher import generate
from arctic_trt.runtime.completion import Listeners
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.scoring import Continuation, Score, Scorer
from arctic_trt.runtime.step import Step

VOCABULARY = 11
LIMITS = BuildConfig(max_batch_size=3, max_input_len=12, max_seq_len=12, max_num_tokens=5, max_beam_width=1)
TABLE_VV = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1))

spans = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=13).flatmap(
    lambda tokens: st.builds(Continuation, st.just(tuple(tokens)), st.integers(1, len(tokens) - 1))
)


def bigrams(step: Step) -> Logits:
    """An engine whose logits depend on the last token alone."""
    rows = [token for chunk in step.chunks for token in chunk.tokens[chunk.logits_from :]]
    return Logits(TABLE_VV[torch.tensor(rows, dtype=torch.int64)])


def expected(continuation: Continuation) -> Score:
    pairs = list(zip(continuation.tokens, continuation.tokens[1:], strict=False))[continuation.begin - 1 :]
    shares = TABLE_VV.double().log_softmax(-1)
    return Score(
        sum(float(shares[before, after]) for before, after in pairs),
        all(int(TABLE_VV[before].argmax()) == after for before, after in pairs),
    )


def score(continuations: list[Continuation], limits: BuildConfig = LIMITS) -> list[Score]:
    scorer = Scorer(continuations, limits, VOCABULARY)
    generate(bigrams, scorer.requests, limits, listeners=Listeners(on_prompt_logits=scorer.add))
    return scorer.scores


@given(st.lists(spans, min_size=1, max_size=6), st.integers(1, 20))
def test_scores_are_sums_of_log_probabilities(continuations: list[Continuation], tokens: int) -> None:
    limits = BuildConfig(max_batch_size=2, max_input_len=12, max_seq_len=12, max_num_tokens=tokens, max_beam_width=1)
    for found, continuation in zip(score(continuations, limits), continuations, strict=True):
        wanted = expected(continuation)
        assert found.log_prob == pytest.approx(wanted.log_prob, abs=1e-5)
        assert found.greedy == wanted.greedy


def test_the_likeliest_tokens_are_greedy() -> None:
    tokens = [3]
    for _ in range(8):
        tokens.append(int(TABLE_VV[tokens[-1]].argmax()))
    other = (*tokens[:-1], (tokens[-1] + 1) % VOCABULARY)
    found = score([Continuation(tuple(tokens), 1), Continuation(other, 1), Continuation((0, *tokens), 2)])
    assert [item.greedy for item in found] == [True, False, True]


def test_continuations_of_one_context_are_computed_once() -> None:
    choices = [Continuation((1, 2, 3, last), 3) for last in range(4)]
    longer = Continuation((1, 2, 3, 9), 2)
    scorer = Scorer([*choices, Continuation((4, 5), 1), longer], LIMITS, VOCABULARY)
    assert [(request.prompt, request.logits_from) for request in scorer.requests] == [((1, 2, 3), 1), ((4,), 0)]
    for found, continuation in zip(score([*choices, longer]), [*choices, longer], strict=True):
        assert found.log_prob == pytest.approx(expected(continuation).log_prob, abs=1e-5)


@pytest.mark.parametrize(
    ("continuation", "complaint"),
    [
        (Continuation((1,), 1), "Continuation 1 begins at token 1 of 1"),
        (Continuation((1, 2), 0), "Continuation 1 begins at token 0 of 2"),
        (Continuation((1, 2), 2), "Continuation 1 begins at token 2 of 2"),
        (Continuation((1, 11), 1), "token id 11, expected 0 to 10"),
        (Continuation((1,) * 14, 1), "Continuation 1 needs 13 tokens before its last one, .* --max_input_len 12"),
    ],
)
def test_what_the_engine_cannot_score(continuation: Continuation, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Scorer([Continuation((1, 2), 1), continuation], LIMITS, VOCABULARY)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    scorer = Scorer([Continuation((1, 2, 3, 4), 1)], LIMITS, VOCABULARY)
    logits_WV = torch.zeros(2, VOCABULARY)
    logits_WV[1, 5] = value
    with pytest.raises(ArcticTrtError, match="logits of prompt 0 at position 2 are not finite"):
        scorer.add(0, 1, logits_WV)
