"""Weights are read in order, ahead of their use, into few buffers; a failed read surfaces where its unit is taken."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.errors import CheckpointError
from arctic_trt.model.layer import AttentionWeights, DenseWeights, MlpWeights
from arctic_trt.quantize.stream import Unit, WeightStream, WorkPool

EXPERTS = range(4)
PATIENCE_S = 20.0


class Recorded(HfCheckpoint):
    """Remembers what was read into which memory; may fail at one of the reads."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(model_dir)
        self.reads: list[tuple[int, int | None, int]] = []
        self.fail_at: int | None = None

    def dense(self, layer: int, memory: Tensor | None = None) -> DenseWeights:
        self._record(layer, None, memory)
        return super().dense(layer, memory)

    def expert(self, layer: int, expert: int, memory: Tensor | None = None) -> MlpWeights:
        self._record(layer, expert, memory)
        return super().expert(layer, expert, memory)

    def _record(self, layer: int, expert: int | None, memory: Tensor | None) -> None:
        if len(self.reads) == self.fail_at:
            raise CheckpointError("the disk is broken.")
        assert memory is not None
        self.reads.append((layer, expert, memory.data_ptr()))


@pytest.fixture
def source(small_model: Path) -> Iterator[Recorded]:
    source = Recorded(small_model)
    yield source
    source.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def flat(weights: DenseWeights | MlpWeights | AttentionWeights) -> list[Tensor]:
    values = [getattr(weights, name) for name in weights.__slots__]
    return [tensor for value in values for tensor in ([value] if isinstance(value, Tensor) else flat(value))]


def same(one: DenseWeights | MlpWeights, other: DenseWeights | MlpWeights) -> bool:
    return all(a.equal(b) for a, b in zip(flat(one), flat(other), strict=True))


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("experts", [EXPERTS, range(1, 3), range(0)], ids=str)
def test_units_are_what_the_checkpoint_holds_in_order(source: Recorded, small_model: Path, experts: range, depth: int) -> None:
    plain = HfCheckpoint(small_model)
    with WeightStream(source, (0, 1), experts, depth) as stream:
        for layer in (0, 1):
            dense = stream.dense(layer)
            assert same(dense.weights, plain.dense(layer))
            dense.release()
            for expert in experts:
                unit = stream.expert(layer, expert)
                assert same(unit.weights, plain.expert(layer, expert))
                unit.release()
    assert [(layer, expert) for layer, expert, _ in source.reads] == [(i, e) for i in (0, 1) for e in (None, *experts)]
    plain.close()


def test_few_buffers_are_used_again_and_again(source: Recorded) -> None:
    with WeightStream(source, (0, 1), EXPERTS, 2) as stream:
        for layer in (0, 1):
            stream.dense(layer).release()
            for expert in EXPERTS:
                stream.expert(layer, expert).release()
    dense = {place for _, expert, place in source.reads if expert is None}
    experts = Counter(place for _, expert, place in source.reads if expert is not None)
    assert len(dense) == 1 and len(experts) <= 2 and sum(experts.values()) == 8 and dense.isdisjoint(experts)


def test_the_reader_goes_ahead_only_as_far_as_there_are_buffers(source: Recorded) -> None:
    with WeightStream(source, (0, 1), EXPERTS, 2) as stream:
        wait_until(lambda: len(source.reads) == 3)
        time.sleep(0.05)
        assert len(source.reads) == 3, "the dense part and two experts"
        stream.dense(0).release()
        stream.expert(0, 0).release()
        wait_until(lambda: len(source.reads) == 4)
        time.sleep(0.05)
        assert source.reads[-1][:2] == (0, 2)


def test_weights_stay_as_they_are_while_somebody_holds_their_unit(source: Recorded, small_model: Path) -> None:
    plain = HfCheckpoint(small_model)
    with WeightStream(source, (0,), EXPERTS, 2) as stream:
        stream.dense(0).release()
        first = stream.expert(0, 0)
        for expert in (1, 2, 3):
            stream.expert(0, expert).release()
        assert same(first.weights, plain.expert(0, 0))
        first.release()
    assert len({place for _, expert, place in source.reads if expert in (1, 2, 3)}) == 1
    plain.close()


@pytest.mark.parametrize("fail_at", range(5))
def test_a_failed_read_is_raised_where_its_unit_is_taken(source: Recorded, fail_at: int) -> None:
    source.fail_at = fail_at
    taken: list[int | None] = []

    def take_all(stream: WeightStream) -> None:
        stream.dense(0).release()
        taken.append(None)
        for expert in EXPERTS:
            stream.expert(0, expert).release()
            taken.append(expert)

    with pytest.raises(CheckpointError, match="the disk is broken"), WeightStream(source, (0,), EXPERTS, 2) as stream:
        take_all(stream)
    assert taken == [None, 0, 1, 2, 3][:fail_at]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "reader"]


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("fail", [False, True])
def test_stopping_early_leaves_no_reader_behind(source: Recorded, held: bool, fail: bool) -> None:
    """Whether the buffers have been given back or not, and whether all was well or not."""

    def leave_early() -> None:
        with WeightStream(source, range(2), EXPERTS, 2) as stream:
            stream.dense(0).release()
            unit = stream.expert(0, 0)
            if not held:
                unit.release()
            if fail:
                raise KeyError

    before = len(readers())
    if fail:
        with pytest.raises(KeyError):
            leave_early()
    else:
        leave_early()
    wait_until(lambda: len(readers()) == before)
    assert len(source.reads) < 10


def test_a_unit_is_given_back_once_by_its_last_holder() -> None:
    back: list[int] = []
    unit: Unit[MlpWeights] = Unit(MlpWeights(*[torch.zeros(1)] * 3), lambda: back.append(1))
    unit.hold()
    work = unit.releasing(lambda: 7)
    unit.release()
    unit.release()
    assert back == []
    assert work() == 7 and back == [1]


def test_work_that_fails_releases_its_unit() -> None:
    back: list[int] = []
    unit: Unit[MlpWeights] = Unit(MlpWeights(*[torch.zeros(1)] * 3), lambda: back.append(1))

    def fail() -> None:
        raise ValueError("oops")

    work = unit.releasing(fail)
    unit.release()
    with pytest.raises(ValueError, match="oops"):
        work()
    assert back == [1]


@pytest.fixture(params=[1, 2, 5])
def pool(request: pytest.FixtureRequest) -> Iterator[WorkPool]:
    pool = WorkPool(request.param)
    yield pool
    pool.close()


def test_results_come_in_the_order_of_the_works(pool: WorkPool) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number

    works = ((lambda number=number: work(number)) for number in range(30))
    assert list(pool.each(works)) == list(range(30))


def test_works_are_made_only_as_they_are_needed(pool: WorkPool) -> None:
    made = 0

    def works() -> Iterator[Callable[[], int]]:
        nonlocal made
        for number in range(100):
            made += 1
            yield lambda number=number: number

    for number in pool.each(works()):
        assert made <= number + pool.workers + 2
    assert made == 100


def test_what_was_left_for_later_fails_when_it_is_drained(pool: WorkPool) -> None:
    done: list[int] = []

    def fail() -> None:
        raise ValueError("oops")

    pool.later(lambda: done.append(1))
    pool.later(fail)
    pool.later(lambda: done.append(2))
    with pytest.raises(ValueError, match="oops"):
        pool.drain()
    pool.drain()
    wait_until(lambda: sorted(done) == [1, 2])


def test_each_thread_computes_alone(pool: WorkPool) -> None:
    assert list(pool.each(torch.get_num_threads for _ in range(10))) == [1] * 10 and torch.get_num_threads() == 1
