"""Every token computed once and in order, within the limits, whatever arrives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.scheduler import PROMPT_LOGITS_A_STEP, Scheduler
from arctic_trt.runtime.step import Chunk, Step

TOKEN = 7
PLENTY = KvRoom(1000)


def request(index: int, prompt: int, output: int, *, prompt_logits: bool = False, logits_from: int = 0) -> Request:
    return Request(
        index=index,
        prompt=tuple(range(1000 * index, 1000 * index + prompt)),
        max_new_tokens=output,
        sampling=Sampling(),
        prompt_logits=prompt_logits,
        logits_from=logits_from,
    )


def waiting(requests: list[Request], *, max_batch_size: int, max_num_tokens: int, room: KvRoom = PLENTY) -> Scheduler:
    scheduler = Scheduler(room, max_batch_size=max_batch_size, max_num_tokens=max_num_tokens)
    for each in requests:
        scheduler.add(each)
    return scheduler


def play(scheduler: Scheduler) -> list[Step]:
    """Run to the end, giving every sequence TOKEN until it has what it asked for."""
    steps = []
    while (step := scheduler.next_step()) is not None:
        steps.append(step)
        for chunk in step.chunks:
            sequence = scheduler.advance(chunk)
            if sequence.ready:
                sequence.tokens.append(TOKEN)
                if sequence.num_generated == sequence.request.max_new_tokens:
                    scheduler.finish(sequence)
    return steps


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_every_token_once_in_order_within_the_limits(shapes: list[tuple[int, int, bool]], batch: int, tokens: int) -> None:
    """With room for all; prompts begin differently, so that nothing is shared."""
    requests = [request(i, prompt, output, prompt_logits=logits) for i, (prompt, output, logits) in enumerate(shapes)]
    steps = play(waiting(requests, max_batch_size=batch, max_num_tokens=tokens))
    cached: dict[int, int] = {}
    for step in steps:
        assert step.chunks and step.num_tokens <= tokens
        for freed in step.freed:
            del cached[freed]
        for chunk in step.chunks:
            assert chunk.start == cached.get(chunk.sequence, 0) and chunk.tokens
            cached[chunk.sequence] = chunk.start + len(chunk.tokens)
        assert len(cached) <= batch
    for wanted in requests:
        mine = [chunk for step in steps for chunk in step.chunks if chunk.sequence == wanted.index]
        assert [token for chunk in mine for token in chunk.tokens] == [*wanted.prompt, *[TOKEN] * (wanted.max_new_tokens - 1)]
        logits = sum(chunk.num_logits for chunk in mine)
        assert logits == wanted.max_new_tokens - 1 + (len(wanted.prompt) if wanted.prompt_logits else 1)


def test_decoding_goes_before_prompts() -> None:
    scheduler = waiting([request(0, 2, 9), request(1, 50, 9)], max_batch_size=2, max_num_tokens=8)
    for _ in range(2):
        step = scheduler.next_step()
        assert step is not None
        for chunk in step.chunks:
            sequence = scheduler.advance(chunk)
            if sequence.ready:
                sequence.tokens.append(TOKEN)
    assert [(chunk.sequence, len(chunk.tokens)) for chunk in step.chunks] == [(0, 1), (1, 7)]


def test_a_sequence_joins_as_soon_as_one_leaves() -> None:
    steps = play(waiting([request(0, 4, 1), request(1, 4, 3), request(2, 4, 2)], max_batch_size=2, max_num_tokens=100))
    assert [[chunk.sequence for chunk in step.chunks] for step in steps] == [[0, 1], [1, 2], [1, 2]]
    assert steps[1].freed == (0,)


@given(st.integers(1, 40), st.data(), st.integers(1, 12), st.integers(1, 3))
def test_prompt_logits_from_a_position_on(prompt: int, data: st.DataObject, tokens: int, output: int) -> None:
    first = data.draw(st.integers(0, prompt - 1))
    steps = play(
        waiting([request(0, prompt, output, prompt_logits=True, logits_from=first)], max_batch_size=1, max_num_tokens=tokens)
    )
    assert wanted_positions([chunk for step in steps for chunk in step.chunks]) == list(range(first, prompt + output - 1))
    assert len(steps) == -(-prompt // tokens) + output - 1


def test_a_prompt_whose_logits_nobody_wants_takes_no_share_of_them() -> None:
    steps = play(waiting([request(0, 3000, 1, prompt_logits=True, logits_from=2500)], max_batch_size=1, max_num_tokens=4000))
    assert [step.num_logits for step in steps] == [500]


def test_prompt_logits_come_in_bounded_steps() -> None:
    requests = [request(i, 1500, 1, prompt_logits=True) for i in range(2)]
    steps = play(waiting(requests, max_batch_size=8, max_num_tokens=8192))
    assert max(step.num_logits for step in steps) == PROMPT_LOGITS_A_STEP
    assert sum(step.num_logits for step in steps) == 3000


def sharing(index: int, *tokens: int, output: int = 2, **options: Any) -> Request:
    return Request(index=index, prompt=tokens, max_new_tokens=output, sampling=Sampling(), **options)


def parts(steps: list[Step]) -> list[list[tuple[int, int, int]]]:
    """(sequence, start, tokens) of each step's chunks."""
    return [[(chunk.sequence, chunk.start, len(chunk.tokens)) for chunk in step.chunks] for step in steps]


def wanted_positions(chunks: list[Chunk]) -> list[int]:
    return [at for chunk in chunks for at in range(chunk.start + chunk.logits_from, chunk.start + len(chunk.tokens))]


SMALL = KvRoom(20, block_tokens=4)
PROMPT = tuple(range(10, 19))


def test_equal_beginnings_are_computed_once_even_in_one_step() -> None:
    requests = [sharing(0, *PROMPT), sharing(1, *PROMPT), sharing(2, *PROMPT[:6], 99)]
    scheduler = waiting(requests, max_batch_size=8, max_num_tokens=100, room=SMALL)
    steps = play(scheduler)
    assert parts(steps)[0] == [(0, 0, 9), (1, 8, 1), (2, 4, 3)]
    first, second, third = (chunk.blocks for chunk in steps[0].chunks)
    assert first[:2] == second[:2] and third[0] == first[0]
    assert len({*first, *second, *third}) == 3 + 1 + 1
    assert scheduler.stats.reused_tokens == 8 + 4 and scheduler.stats.computed_tokens == 9 + 1 + 3 + 3


def test_a_sequence_follows_another_through_a_long_prompt() -> None:
    prompt = range(30)
    scheduler = waiting([sharing(0, *prompt), sharing(1, *prompt)], max_batch_size=2, max_num_tokens=9, room=SMALL)
    steps = play(scheduler)
    assert sum(len(chunk.tokens) for step in steps for chunk in step.chunks) == 30 + 2 + 2
    assert scheduler.stats.reused_tokens == 28


def test_what_was_generated_is_found_by_who_says_it_back() -> None:
    scheduler = waiting([sharing(0, 1, 2, 3, output=6)], max_batch_size=2, max_num_tokens=100, room=SMALL)
    play(scheduler)
    scheduler.add(sharing(1, 1, 2, 3, *[TOKEN] * 6))
    assert parts(play(scheduler))[0] == [(1, 8, 1)]


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = waiting([sharing(0, *PROMPT[:8])], max_batch_size=2, max_num_tokens=100, room=SMALL)
    play(scheduler)
    scheduler.add(sharing(1, *PROMPT[:8]))
    assert parts(play(scheduler))[0] == [(1, 4, 4)]


@given(st.integers(0, 8))
def test_nothing_is_reused_whose_logits_are_wanted(first: int) -> None:
    scheduler = waiting([sharing(0, *PROMPT)], max_batch_size=2, max_num_tokens=100, room=SMALL)
    play(scheduler)
    scheduler.add(sharing(1, *PROMPT, prompt_logits=True, logits_from=first))
    (chunk,) = play(scheduler)[0].chunks
    assert chunk.start == first // 4 * 4 and chunk.start + chunk.logits_from == first


def test_the_youngest_gives_its_blocks_to_those_before_it_and_keeps_its_tokens() -> None:
    requests = [request(0, 4, 13), request(1, 4, 13), request(2, 4, 9)]
    scheduler = waiting(requests, max_batch_size=3, max_num_tokens=100, room=KvRoom(6, block_tokens=4))
    steps = play(scheduler)
    assert parts(steps)[0] == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    lost = next(number for number, step in enumerate(steps) if step.freed)
    assert steps[lost].freed == (2,) and [chunk.sequence for chunk in steps[lost].chunks] == [0, 1]
    back = next(chunk for step in steps[lost:] for chunk in step.chunks if chunk.sequence == 2)
    assert back.tokens[-1] == TOKEN and back.start + len(back.tokens) > 4
    assert scheduler.stats.preemptions > 0 and scheduler.stats.blocks_in_use == 0
    order = list(dict.fromkeys(chunk.sequence for step in steps for chunk in step.chunks))
    assert order == [0, 1, 2]


def test_prompt_logits_come_once_though_the_prompt_is_computed_twice() -> None:
    requests = [request(0, 4, 17), request(1, 9, 8, prompt_logits=True)]
    scheduler = waiting(requests, max_batch_size=2, max_num_tokens=100, room=KvRoom(6, block_tokens=4))
    mine = [chunk for step in play(scheduler) for chunk in step.chunks if chunk.sequence == 1]
    assert scheduler.stats.preemptions > 0 and sum(len(chunk.tokens) for chunk in mine) > 16
    assert wanted_positions(mine) == list(range(16))


def test_what_does_not_fit_alone_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="does not fit into the KV cache alone"):
        play(waiting([request(0, 9, 1)], max_batch_size=1, max_num_tokens=4, room=KvRoom(2, block_tokens=4)))


def test_nobody_overtakes_one_that_waits_for_room() -> None:
    requests = [request(0, 30, 8), request(1, 30, 2), request(2, 1, 2)]
    steps = play(waiting(requests, max_batch_size=8, max_num_tokens=100, room=KvRoom(10, block_tokens=4)))
    assert list(dict.fromkeys(chunk.sequence for step in steps for chunk in step.chunks)) == [0, 1, 2]
    assert [chunk.sequence for chunk in steps[0].chunks] == [0]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(0, 8),
)
def test_whoever_fits_alone_comes_to_an_end(shapes: list[tuple[int, int, bool]], batch: int, tokens: int, more: int) -> None:
    """And every logit that is wanted comes once, however often sequences lose their blocks."""
    requests = [
        sharing(i, *range(prompt), output=output, prompt_logits=logits) for i, (prompt, output, logits) in enumerate(shapes)
    ]
    room = KvRoom(max(SMALL.blocks_for(each.num_cached) for each in requests) + more, block_tokens=4)
    scheduler = waiting(requests, max_batch_size=batch, max_num_tokens=tokens, room=room)
    steps = play(scheduler)
    for wanted in requests:
        mine = [chunk for step in steps for chunk in step.chunks if chunk.sequence == wanted.index]
        first = 0 if wanted.prompt_logits else len(wanted.prompt) - 1
        assert wanted_positions(mine) == list(range(first, wanted.num_cached))
    assert all(step.chunks and step.num_tokens <= tokens for step in steps)
    assert scheduler.stats.blocks_in_use == 0


def test_a_sequence_can_be_taken_out_wherever_it_is() -> None:
    requests = [request(0, 9, 9), request(1, 40, 9), request(2, 9, 9)]
    scheduler = waiting(requests, max_batch_size=2, max_num_tokens=12, room=SMALL)
    assert scheduler.next_step() is not None
    for index in (2, 1, 0):  # waiting, within its prompt, about to decode
        scheduler.finish(scheduler.sequence(index))
    assert scheduler.stats.blocks_in_use == 0 and scheduler.next_step() is None
    with pytest.raises(KeyError):
        scheduler.sequence(1)
