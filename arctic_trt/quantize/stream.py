"""Weights on their way from disk: read ahead of their use into a few buffers that are used again and again."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from arctic_trt.model.layer import on_device

Weights = TypeVar("Weights")
Dense = TypeVar("Dense")
Expert = TypeVar("Expert")
DenseOut = TypeVar("DenseOut", covariant=True)
ExpertOut = TypeVar("ExpertOut", covariant=True)
Result = TypeVar("Result")


class LayerSource(Protocol[DenseOut, ExpertOut]):
    """What a stream reads from: the parts of layers, in the form in which their user multiplies them."""

    def dense(self, layer: int, memory: Tensor) -> DenseOut:
        """Everything of ``layer`` but its experts, as far as possible in ``memory`` (uint8)."""
        ...

    def expert(self, layer: int, expert: int, memory: Tensor) -> ExpertOut:
        """One expert."""
        ...

    def buffer_bytes(self, layer: int, expert: int | None) -> int:
        """The memory that :meth:`dense` (``expert`` None) or :meth:`expert` wants."""
        ...

    def expect(self, layer: int, expert: int | None) -> None:
        """The disk may start on this part."""
        ...


class Unit(Generic[Weights]):
    """The weights of one read. The buffer they lie in returns to the reader when its last holder has released it."""

    def __init__(self, weights: Weights, give_back: Callable[[], None]) -> None:
        self.weights: Weights = weights
        self._give_back = give_back
        self._holders = 1
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Count one more holder."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Count one holder less."""
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._give_back()

    def releasing(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """``work`` as a holder: it holds the unit from now until it has run."""
        self.hold()

        def run() -> Result:
            try:
                return work()
            finally:
                self.release()

        return run


@dataclass(frozen=True, slots=True)
class _Step:
    layer: int
    expert: int | None


class StopReading(Exception):  # noqa: N818 - not an error
    """The consumer has left; the reader ends quietly."""


class WeightStream(Generic[Dense, Expert]):
    """Reads, for each layer, the dense weights and then the given experts, in a thread of its own.

    At most ``depth`` experts and one layer's dense weights are in memory at a time, in buffers allocated once. Units are taken
    in the order in which they are read, by :meth:`dense` and :meth:`expert`; a failed read is raised there.
    """

    def __init__(
        self, source: LayerSource[Dense, Expert], layers: Iterable[int], experts: range, depth: int, device: str = "cpu"
    ) -> None:
        self._source = source
        self._device = device
        self._steps = [_Step(layer, expert) for layer in layers for expert in (None, *experts)]
        self._depth = depth
        self._ready: queue.SimpleQueue[tuple[_Step, Unit[Dense] | Unit[Expert] | BaseException]] = queue.SimpleQueue()
        self._free: dict[bool, queue.SimpleQueue[Tensor | None]] = {True: queue.SimpleQueue(), False: queue.SimpleQueue()}
        self._thread = threading.Thread(target=self._read_all, name="reader", daemon=True)

    def __enter__(self) -> WeightStream[Dense, Expert]:
        for dense, count in ((True, 1), (False, self._depth)):
            step = next((step for step in self._steps if (step.expert is None) is dense), None)
            for _ in range(count if step else 0):
                assert step is not None
                size = self._source.buffer_bytes(step.layer, step.expert)
                self._free[dense].put(torch.empty(size, dtype=torch.uint8, pin_memory=self._device != "cpu"))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for free in self._free.values():
            free.put(None)
        if error is None:
            self._thread.join()

    def dense(self, layer: int) -> Unit[Dense]:
        """The next unit, which is the dense part of ``layer``."""
        unit = self._take(_Step(layer, None))
        return unit  # type: ignore[return-value]

    def expert(self, layer: int, expert: int) -> Unit[Expert]:
        """The next unit, which is ``expert`` of ``layer``."""
        unit = self._take(_Step(layer, expert))
        return unit  # type: ignore[return-value]

    def _take(self, expected: _Step) -> Unit[Dense] | Unit[Expert]:
        step, unit = self._ready.get()
        if isinstance(unit, BaseException):
            raise unit
        assert step == expected, f"took {expected}, the stream is at {step}"
        return unit

    def _read_all(self) -> None:
        for index, step in enumerate(self._steps):
            try:
                unit = self._read(step)
                if index + 1 < len(self._steps):
                    self._source.expect(self._steps[index + 1].layer, self._steps[index + 1].expert)
            except StopReading:
                return
            except BaseException as error:
                self._ready.put((step, error))
                return
            self._ready.put((step, unit))

    def _read(self, step: _Step) -> Unit[Dense] | Unit[Expert]:
        free = self._free[step.expert is None]
        memory = free.get()
        if memory is None:
            raise StopReading
        if step.expert is None:
            return Unit(self._placed(self._source.dense(step.layer, memory)), lambda: free.put(memory))
        return Unit(self._placed(self._source.expert(step.layer, step.expert, memory)), lambda: free.put(memory))

    def _placed(self, weights: Weights) -> Weights:
        return weights if self._device == "cpu" else on_device(weights, self._device)


class WorkPool:
    """Threads that calibrate, cast and write units side by side, each on one core.

    Torch's own threads are not used here: they wait for each other at every operation, which costs more than it gains on
    matrices of this size, and far more on a machine that also does something else.
    """

    def __init__(self, workers: int) -> None:
        torch.set_num_threads(1)
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, "work", initializer=torch.set_num_threads, initargs=(1,))
        self._futures: list[Future[None]] = []

    def start(self, work: Callable[[], Result]) -> Future[Result]:
        """Run ``work``; its caller takes the result."""
        return self._pool.submit(work)

    def later(self, work: Callable[[], None]) -> None:
        """Run ``work``; what it raises is raised by :meth:`drain`."""
        self._futures.append(self._pool.submit(work))

    def each(self, works: Iterable[Callable[[], Result]]) -> Iterator[Result]:
        """Results of ``works`` in their order, with no more of them under way than keeps every thread busy."""
        pending: deque[Future[Result]] = deque()
        for work in works:
            if len(pending) > self.workers:
                yield pending.popleft().result()
            pending.append(self._pool.submit(work))
        while pending:
            yield pending.popleft().result()

    def drain(self) -> None:
        """Wait for everything that was left for later, and raise the first failure."""
        futures, self._futures = self._futures, []
        for future in futures:
            future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
