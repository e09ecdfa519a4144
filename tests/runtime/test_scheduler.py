"""Every token computed once and in order, within the limits, whatever arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.scheduler import PROMPT_LOGITS_A_STEP, Scheduler
from arctic_trt.runtime.step import Step

TOKEN = 7
PLENTY = KvRoom(1000)


def request(index: int, prompt: int, output: int, *, prompt_logits: bool = False, logits_from: int = 0) -> Request:
    return Request(
        index=index,
        prompt=tuple(range(prompt)),
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
    wanted = [
        position
        for step in steps
        for chunk in step.chunks
        for position in range(chunk.start + chunk.logits_from, chunk.start + len(chunk.tokens))
    ]
    assert wanted == list(range(first, prompt + output - 1))
    assert len(steps) == -(-prompt // tokens) + output - 1


def test_a_prompt_whose_logits_nobody_wants_takes_no_share_of_them() -> None:
    steps = play(waiting([request(0, 3000, 1, prompt_logits=True, logits_from=2500)], max_batch_size=1, max_num_tokens=4000))
    assert [step.num_logits for step in steps] == [500]


def test_prompt_logits_come_in_bounded_steps() -> None:
    requests = [request(i, 1500, 1, prompt_logits=True) for i in range(2)]
    steps = play(waiting(requests, max_batch_size=8, max_num_tokens=8192))
    assert max(step.num_logits for step in steps) == PROMPT_LOGITS_A_STEP
    assert sum(step.num_logits for step in steps) == 3000
