"""Ten thousand arrivals and departures: everybody gets what they would get alone, and no block of the cache is lost.

Ranks are made up here that store, for every position, the whole text up to it, and read it back through block tables before they
answer: a block in the wrong hands, or given away too early, is a wrong answer.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.engine.config import BuildConfig, read_engine_config
from arctic_trt.runtime.batcher import Batcher, generate
from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.completion import Completion, Listeners
from arctic_trt.runtime.outcome import Logits
from arctic_trt.runtime.requests import Request
from arctic_trt.runtime.sampler import Sampling
from arctic_trt.runtime.step import Step, decode_step, encode_step
from arctic_trt.runtime.worker import Worker, load_worker
from tests.runtime.conftest import Model

VOCABULARY = 6
LIMITS = BuildConfig(max_batch_size=6, max_input_len=60, max_seq_len=90, max_num_tokens=16, max_beam_width=1)
ROOM = KvRoom(12, block_tokens=4)
LONGEST = 40  # positions; ROOM has 48


class RememberingRanks:
    """What each position of the pages holds: a hash of all tokens up to it."""

    def __init__(self, room: KvRoom) -> None:
        self.size = room.block_tokens
        self.tables: dict[int, list[int]] = {}
        self.texts: dict[int, list[int]] = {}
        self.pages: dict[tuple[int, int], int] = {}

    def execute(self, step: Step) -> Logits:
        step = decode_step(encode_step(step))
        for freed in step.freed:
            del self.tables[freed], self.texts[freed]
        for chunk in step.chunks:
            self.tables.setdefault(chunk.sequence, []).extend(chunk.blocks)
        written = [self.write(chunk.sequence, chunk.start, chunk.tokens) for chunk in step.chunks]
        assert len({slot for slots in written for slot in slots}) == step.num_tokens
        rows = [self.read(chunk.sequence, chunk.start + len(chunk.tokens)) for chunk in step.chunks if chunk.num_logits]
        self.check_sharing()
        return Logits(self.answer(rows))

    def answer(self, rows: list[int]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(rows, dtype=torch.int64) % VOCABULARY, VOCABULARY).float()

    def write(self, sequence: int, start: int, tokens: tuple[int, ...]) -> list[tuple[int, int]]:
        text = self.texts.setdefault(sequence, [])
        while len(text) < start:  # shared: whoever filled these blocks may do so in this very step
            text.append(self.pages.get(self.slot(sequence, len(text)), -1))
        assert len(text) == start
        slots = [self.slot(sequence, start + offset) for offset in range(len(tokens))]
        for slot, token in zip(slots, tokens, strict=True):
            text.append(hash((text[-1] if text else 0, token)))
            self.pages[slot] = text[-1]
        return slots

    def read(self, sequence: int, length: int) -> int:
        found = [self.pages[self.slot(sequence, position)] for position in range(length)]
        assert found == self.texts[sequence][:length]
        return found[-1]

    def slot(self, sequence: int, position: int) -> tuple[int, int]:
        return self.tables[sequence][position // self.size], position % self.size

    def check_sharing(self) -> None:
        """Only full blocks are in several hands, at the same place of each."""
        places: dict[int, int] = {}
        for sequence, table in self.tables.items():
            for place, block in enumerate(table):
                full = (place + 1) * self.size <= len(self.texts[sequence])
                assert places.setdefault(block, place if full else -1 - sequence) == (place if full else -1 - sequence)


def alone(request: Request) -> tuple[int, ...]:
    """What the made-up ranks answer, worked out without them."""
    state, generated = 0, list[int]()
    for token in request.prompt:
        state = hash((state, token))
    while len(generated) < request.max_new_tokens and not (generated and generated[-1] in request.end_ids):
        generated.append(state % VOCABULARY)
        state = hash((state, generated[-1]))
    return tuple(generated)


def make_request(index: int, draw: random.Random, vocabulary: int, longest: int) -> Request:
    """Many begin alike: the same tokens over and over, and then something else."""
    length = draw.randint(1, longest // 2)
    alike = draw.choice([0, length // 2, length])
    prompt = [1 + position % 3 for position in range(alike)] + [draw.randrange(vocabulary) for _ in range(length - alike)]
    output = draw.randint(1, longest + 1 - length)
    return Request(index=index, prompt=tuple(prompt), max_new_tokens=output, sampling=Sampling(), end_ids=frozenset({0}))


class Traffic:
    """Arrivals, cancellations and steps in random order, then nothing but steps until all are done."""

    def __init__(self, batcher: Batcher, draw: random.Random, *, vocabulary: int, longest: int, patience: int) -> None:
        self.batcher, self.draw = batcher, draw
        self.vocabulary, self.longest, self.patience = vocabulary, longest, patience
        self.requests: dict[int, Request] = {}

    def flow(self, events: int) -> None:
        under_way: list[int] = []
        for event in range(events):
            if self.draw.random() < 0.53:
                self.requests[event] = make_request(event, self.draw, self.vocabulary, self.longest)
                self.batcher.add(self.requests[event])
                under_way.append(event)
            elif under_way:
                self.batcher.cancel(under_way.pop(self.draw.randrange(len(under_way))))
            if self.draw.randrange(self.patience) == 0:
                self.batcher.step()
        while not self.batcher.idle:
            self.batcher.step()


def check_nothing_is_lost(batcher: Batcher) -> None:
    pool = batcher._scheduler._pool
    assert [pool.references(block) for block in range(pool.num_blocks)] == [0] * pool.num_blocks
    assert (batcher.stats.blocks_in_use, pool.num_available) == (0, pool.num_blocks)
    assert sorted([*pool._unused, *pool._cached]) == list(range(pool.num_blocks))
    assert batcher._scheduler.next_step() is None


def check_all_are_answered(traffic: Traffic, done: dict[int, Completion]) -> None:
    """As if they had been alone, until they were cancelled."""
    assert done.keys() == traffic.requests.keys()
    for index, request in traffic.requests.items():
        expected, found = alone(request), done[index]
        cancelled = found.finish_reason == "cancelled"
        assert found.token_ids == (expected[: len(found.token_ids)] if cancelled else expected)


@pytest.mark.parametrize(("seed", "patience"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4)])
def test_ten_thousand_events_among_made_up_ranks(seed: int, patience: int) -> None:
    """2000 each; every completion is what the request alone would get, or the beginning of it if it was cancelled."""
    done: dict[int, Completion] = {}
    batcher = Batcher(
        RememberingRanks(ROOM).execute, LIMITS, room=ROOM, listeners=Listeners(on_done=lambda index, c: done.update({index: c}))
    )
    traffic = Traffic(batcher, random.Random(seed), vocabulary=VOCABULARY, longest=LONGEST, patience=patience)
    traffic.flow(2000)
    check_nothing_is_lost(batcher)
    check_all_are_answered(traffic, done)
    assert batcher.stats.reused_tokens and (batcher.stats.preemptions or patience > 2)


@pytest.fixture(scope="module")
def worker(tiny: Model) -> Worker:
    engine = tiny.engine("fp8")
    config, mapping, quant = read_engine_config(engine).network()
    return load_worker(engine, config, quant, mapping.rank(0), SoloCommunicator())


@settings(max_examples=2, phases=[Phase.generate], derandomize=True)
@given(st.integers(0, 2**32))
def test_ten_thousand_events_in_the_tiny_model(worker: Worker, seed: int) -> None:
    """5000 each, more of them between two steps: the model takes its time."""
    limits = replace(LIMITS, max_batch_size=48, max_num_tokens=256)
    worker.reserve(KvRoom(24, block_tokens=2))
    batcher = Batcher(worker.lead, limits, room=worker.room)
    Traffic(batcher, random.Random(seed), vocabulary=500, longest=16, patience=60).flow(5000)
    check_nothing_is_lost(batcher)
    assert batcher.stats.preemptions and batcher.stats.reused_tokens
    worker.dismiss()


def test_64_mixed_requests_get_what_each_gets_alone(worker: Worker) -> None:
    """Short and long, alike and unlike, in less room than they would like and a few tokens at a time."""
    draw = random.Random(3)
    requests = [replace(make_request(index, draw, 500, 44), end_ids=frozenset()) for index in range(64)]
    ample, scarce = KvRoom(16, block_tokens=8), KvRoom(20, block_tokens=4)
    worker.reserve(ample)
    expected = []
    for request in requests:
        expected += generate(worker.lead, [request], LIMITS, room=ample)
        worker.dismiss()
    worker.reserve(scarce)
    done: dict[int, Completion] = {}
    listeners = Listeners(on_done=lambda index, completion: done.update({index: completion}))
    batcher = Batcher(worker.lead, replace(LIMITS, max_num_tokens=13), room=scarce, listeners=listeners)
    for request in requests:
        batcher.add(request)
    while not batcher.idle:
        batcher.step()
    worker.dismiss()
    assert [done[request.index] for request in requests] == expected
    assert batcher.stats.preemptions > 5 and batcher.stats.reused_tokens > 200


def test_samples_of_one_prompt_share_it(worker: Worker, tiny: Model) -> None:
    prompt = tuple(tiny.prompts(50)[0])
    requests = [Request(index=index, prompt=prompt, max_new_tokens=5, sampling=Sampling()) for index in range(6)]
    worker.reserve(KvRoom(60, block_tokens=8))
    batcher = Batcher(worker.lead, replace(LIMITS, max_num_tokens=100), room=worker.room)
    for request in requests:
        batcher.add(request)
    batcher.step()
    assert (batcher.stats.computed_tokens, batcher.stats.reused_tokens) == (50 + 5 * 2, 5 * 48)
    assert batcher.stats.blocks_in_use == 6 + 6
    batcher.cancel(0)
    while not batcher.idle:
        batcher.step()
    worker.dismiss()
