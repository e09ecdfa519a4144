"""Running ahead of what is known changes nothing that comes out of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.tokenizer import Tokenizer
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.chooser import Chooser
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.cuda.choose import choose_row
from arctic_trt.runtime.detokenizer import Detokenizer, settled_ids
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.scheduler import Scheduler
from arctic_trt.runtime.step import LIKELIEST, UNKNOWN, Step
from tests.runtime.test_traffic import (
    LIMITS,
    LONGEST,
    ROOM,
    VOCABULARY,
    RememberingRanks,
    Traffic,
    alone,
    check_all_are_answered,
    check_nothing_is_lost,
    make_request,
)
from tests.support.late_ranks import LateRanks
from tests.support.small_tokenizer import write_tokenizer

SAMPLED = Sampling(temperature=1.3, top_k=5, top_p=0.9, min_p=0.02, seed=4)
HOSTED: list[dict[str, Any]] = [
    {"sampling": replace(SAMPLED, repetition_penalty=1.2)},
    {"bad_words": ((2,), (3, 4))},
    {"logprobs": 2},
]
"""What the ranks cannot choose by themselves."""


@dataclass(frozen=True)
class Chosen:
    logits_WV: Tensor
    chosen: list[int]

    def logits(self) -> Tensor:
        return self.logits_WV

    def tokens(self) -> list[int]:
        return self.chosen


class ChoosingRanks(RememberingRanks):
    """They find the tokens that they chose in the step before, and of no earlier one."""

    def __init__(self, room: KvRoom = ROOM) -> None:
        super().__init__(room)
        self.chosen: dict[int, int] = {}

    def execute(self, step: Step) -> Logits | Chosen:  # type: ignore[override]
        chunks = tuple(
            replace(chunk, tokens=tuple(self.chosen[chunk.sequence] if token == UNKNOWN else token for token in chunk.tokens))
            for chunk in step.chunks
        )
        logits_WV = super().execute(replace(step, chunks=chunks)).logits_WV
        wanting = [chunk for chunk in step.chunks if chunk.num_logits]
        choices = [(row, chunk) for row, chunk in enumerate(wanting) if chunk.choice is not None]
        self.chosen = {chunk.sequence: choose_row(logits_WV[row], chunk.choice) for row, chunk in choices}
        return Chosen(logits_WV[[row for row, chunk in enumerate(wanting) if chunk.choice is None]], list(self.chosen.values()))


class Noisy:
    """Logits that depend on the whole text, and are not finite after some."""

    broken: int | None = None

    def answer(self, rows: list[int]) -> Tensor:
        draws = [torch.Generator().manual_seed(row % 2**32) for row in rows]
        logits_WV = torch.stack([torch.randn(VOCABULARY, generator=draw) * 2 for draw in draws]) if rows else torch.zeros(0, 6)
        for row, state in enumerate(rows):
            if self.broken and state % self.broken == 0:
                logits_WV[row, 0] = torch.nan
        return logits_WV


class NoisyRanks(Noisy, RememberingRanks):
    pass


class NoisyChoosingRanks(Noisy, ChoosingRanks):
    pass


@pytest.mark.parametrize(("seed", "patience"), [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_events_among_ranks_that_are_late(seed: int, patience: int) -> None:
    """1500 each; every completion is what the request alone would get, or the beginning of it if it was cancelled."""
    done: dict[int, Completion] = {}
    ranks = LateRanks(ChoosingRanks().execute)
    listeners = Listeners(on_done=lambda index, completion: done.update({index: completion}))
    batcher = Batcher(ranks.execute, LIMITS, ahead=True, room=ROOM, listeners=listeners)
    traffic = Traffic(batcher, random.Random(seed), vocabulary=VOCABULARY, longest=LONGEST, patience=patience)
    traffic.flow(1500)
    check_nothing_is_lost(batcher)
    check_all_are_answered(traffic, done)
    assert batcher.stats.preemptions and batcher.stats.reused_tokens
    assert ranks.most_ahead in (2, 3), "the third one is of sequences that were all cancelled"
    assert any(UNKNOWN in chunk.tokens for step in ranks.steps for chunk in step.chunks)


def mixed(count: int, seed: int) -> list[Request]:
    """Some are chosen by the ranks, some are not, some draw; half of them end at a token."""
    draw, requests = random.Random(seed), []
    for index in range(count):
        request = replace(make_request(index, draw, VOCABULARY, LONGEST), end_ids=frozenset(draw.choice([(), (0, 5)])))
        kind = draw.randrange(6)
        if kind < 3:
            request = replace(request, sampling=replace(SAMPLED, seed=kind))
        elif kind == 3:
            request = replace(request, **draw.choice(HOSTED))
        requests.append(request)
    return requests


@settings(max_examples=8, phases=[Phase.generate], derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([None, 40]))
def test_mixed_requests_get_what_they_get_from_ranks_that_are_waited_for(seed: int, broken: int | None) -> None:
    """Tokens, reasons, log probabilities and errors, in scarce room; and nothing but what they need is computed."""
    outcomes = []
    for ahead in (False, True):
        told: dict[int, list[object]] = {}
        network = NoisyChoosingRanks(ROOM) if ahead else NoisyRanks(ROOM)
        network.broken = broken
        ranks = LateRanks(network.execute)
        listeners = Listeners(
            on_token=lambda index, token, told=told: told.setdefault(index, []).append(token),
            on_done=lambda index, completion, told=told: told.setdefault(index, []).append(completion),
            on_error=lambda index, error, told=told: told.setdefault(index, []).append(str(error)),
        )
        batcher = Batcher(ranks.execute, LIMITS, ahead=ahead, room=ROOM, listeners=listeners)
        for request in mixed(24, seed):
            batcher.add(request)
        while not batcher.idle:
            batcher.step()
        check_nothing_is_lost(batcher)
        assert not ahead or ranks.most_ahead == 2
        outcomes.append(told)
    assert outcomes[0] == outcomes[1]


def test_what_was_computed_too_many_is_in_no_figure_and_in_no_block() -> None:
    """A request that ends at a token computes one more; another that continues its text finds what the plain way leaves."""
    found = []
    for ahead in (False, True):
        asked = Request(index=0, prompt=(1, 2, 3), max_new_tokens=20, sampling=Sampling())
        tokens = alone(asked)
        end = next(place for place in range(2, 20) if tokens[place] not in tokens[:place])
        ranks = LateRanks((ChoosingRanks() if ahead else RememberingRanks(ROOM)).execute)
        batcher = Batcher(ranks.execute, LIMITS, ahead=ahead, room=ROOM)
        batcher.add(replace(asked, end_ids=frozenset({tokens[end]})))
        while not batcher.idle:
            batcher.step()
        computed = batcher.stats.computed_tokens
        again = Request(index=1, prompt=(*asked.prompt, *tokens[: end + 1], 5, 5, 5, 5), max_new_tokens=1, sampling=Sampling())
        batcher.add(again)
        while not batcher.idle:
            batcher.step()
        assert len(ranks.steps) == end + 1 + ahead + 1
        found.append((computed, batcher.stats.computed_tokens, batcher.stats.reused_tokens))
    assert found[0] == found[1] and found[0][0] == 3 + end


def counting_ranks() -> LateRanks:
    """The likeliest next token is the last one plus one."""
    last: dict[int, int] = {}

    def compute(step: Step) -> Chosen:
        nonlocal last
        heads = {
            chunk.sequence: chunk.tokens[-1] if chunk.tokens[-1] != UNKNOWN else last[chunk.sequence] for chunk in step.chunks
        }
        last = {sequence: token + 1 for sequence, token in heads.items()}
        assert all(chunk.choice is LIKELIEST for chunk in step.chunks)
        return Chosen(torch.zeros(0, 9), list(last.values()))

    return LateRanks(compute)


def test_who_comes_waits_for_no_more_than_the_step_that_is_begun() -> None:
    told: list[tuple[int, object]] = []
    listeners = Listeners(
        on_token=lambda index, token: told.append((index, token)),
        on_done=lambda index, completion: told.append((index, completion.finish_reason)),
    )
    ranks = counting_ranks()
    batcher = Batcher(ranks.execute, replace(LIMITS, max_batch_size=2), ahead=True, listeners=listeners)

    def ask(index: int, token: int, output: int) -> None:
        batcher.add(Request(index=index, prompt=(token,), max_new_tokens=output, sampling=Sampling()))

    ask(0, 5, 9)
    batcher.step()
    assert told == [(0, 6)] and len(ranks.steps) == 2
    ask(1, 20, 2)
    ask(2, 30, 2)  # waits for a place
    batcher.step()
    assert [chunk.sequence for chunk in ranks.steps[2].chunks] == [0, 1], "the next step to be begun"
    batcher.step()
    batcher.step()
    assert [chunk.sequence for chunk in ranks.steps[4].chunks] == [0, 2], "the place of a sequence whose length is known is free"
    batcher.cancel(0)
    ask(0, 70, 3)  # under the name of one whose last step is still being computed
    while not batcher.idle:
        batcher.step()
    assert [token for index, token in told if index == 2] == [31, 32, "length"]
    assert [token for index, token in told if index == 0] == [6, 7, 8, 9, "cancelled", 71, 72, 73, "length"]
    assert [token for index, token in told if index == 1] == [21, 22, "length"]


def test_a_stop_word_ends_a_text_where_it_does_without_running_ahead(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    ids = tokenizer.encode("the sea is the sky")[1:]

    def compute(step: Step) -> Chosen:
        return Chosen(torch.zeros(0, 9), [ids[min(chunk.start + len(chunk.tokens), len(ids)) - 1] for chunk in step.chunks])

    asked = [Request(index=i, prompt=(1,), max_new_tokens=9, sampling=Sampling(), stop_words=("ea is",)) for i in range(2)]
    ranks = LateRanks(compute)
    completions = generate(
        ranks.execute, asked, LIMITS, ahead=True, detokenizer=lambda: Detokenizer(tokenizer.decode, settled_ids(tokenizer))
    )
    assert [(each.text, each.finish_reason) for each in completions] == [("the s", "stop")] * 2
    assert len(ranks.steps) == len(completions[0].token_ids) + 1 < 9


def test_an_error_that_nobody_takes_is_raised_and_names_the_position() -> None:
    ranks = LateRanks(lambda step: Chosen(torch.zeros(0, 9), [-1 if chunk.start > 2 else 3 for chunk in step.chunks]))
    with pytest.raises(ArcticTrtError, match="logits of prompt 1 at position 3 are not finite"):
        generate(ranks.execute, [Request(index=1, prompt=(5, 6), max_new_tokens=9, sampling=Sampling())], LIMITS, ahead=True)


def steps_of(requests: list[Request], room: KvRoom, batch: int, tokens: int, *, ahead: bool) -> list[Step]:
    """What a scheduler asks for, whose sequences all say 7."""
    scheduler = Scheduler(room, max_batch_size=batch, max_num_tokens=tokens)
    for request in requests:
        scheduler.add(request, (lambda: LIKELIEST) if ahead else None)
    steps: list[Step] = []
    late: list[Any] = []
    while (step := scheduler.next_step()) is not None or late:
        known, late = late, []
        if step is not None:
            steps.append(step)
            sequences = [(chunk, scheduler.advance(chunk)) for chunk in step.chunks]
            late = [sequence for chunk, sequence in sequences if sequence.ready or chunk.choice]
        for sequence in known if ahead else late:
            sequence.learn(7)
            if sequence.num_generated == sequence.request.max_new_tokens:
                scheduler.finish(sequence)
        late = late if ahead else []
    assert scheduler.stats.blocks_in_use == 0
    return steps


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 8),
)
def test_steps_are_those_of_who_knows_all_tokens(shapes: list[tuple[int, int]], batch: int, tokens: int, more: int) -> None:
    """Where requests end by their length: the same chunks in the same blocks, and what is freed, however scarce room is."""
    requests = [
        Request(index=i, prompt=tuple(range(100 * i, 100 * i + prompt)), max_new_tokens=output, sampling=Sampling())
        for i, (prompt, output) in enumerate(shapes)
    ]
    size = KvRoom(0, block_tokens=4)
    room = KvRoom(max(size.blocks_for(request.num_cached) for request in requests) + more, block_tokens=4)
    plain, ahead = (steps_of(requests, room, batch, tokens, ahead=ahead) for ahead in (False, True))
    assert [known(step) for step in ahead] == plain


def known(step: Step) -> Step:
    chunks = (
        replace(chunk, tokens=tuple(7 if token == UNKNOWN else token for token in chunk.tokens), choice=None)
        for chunk in step.chunks
    )
    return replace(step, chunks=tuple(chunks))


@pytest.mark.parametrize("options", HOSTED)
def test_what_the_ranks_cannot_choose(options: dict[str, Any]) -> None:
    request = Request(index=0, prompt=(1,), max_new_tokens=1, **{"sampling": SAMPLED, **options})
    assert not Chooser(request).by_ranks and Chooser(replace(request, sampling=SAMPLED, bad_words=(), logprobs=None)).by_ranks
