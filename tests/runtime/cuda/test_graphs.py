"""For how many sequences decode steps are recorded, and in which order what is asked of CUDA, by a stand-in for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import RefusedError
from arctic_trt.runtime.cuda import graphs
from arctic_trt.runtime.cuda.graphs import graph_sizes, record

GPU = torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (100, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]),
        (256, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]),
    ],
)
def test_sizes(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


@given(st.integers(1, 4096), st.data())
def test_every_step_has_a_size_that_is_not_much_larger(most: int, data: st.DataObject) -> None:
    sizes, sequences = graph_sizes(most), data.draw(st.integers(1, most))
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and len(sizes) <= 6 + 4 * most.bit_length()
    size = min(size for size in sizes if size >= sequences)
    assert size < sequences + max(8, sequences / 4) and (sequences > 8 or size < 2 * sequences)


class Cuda:
    """What of ``torch.cuda`` a recording needs, which notes what is asked of it."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self, free: int = 100) -> None:
        self.asked: list[Any] = []
        self.free = free
        self.capturing = False

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        assert device == GPU
        return self.free * 10**9, 141 * 10**9

    def graph_pool_handle(self) -> str:
        self.asked.append("pool")
        return "the pool"

    def current_stream(self, device: torch.device) -> Cuda.Line:
        return self.Line()

    def Stream(self, device: torch.device) -> Cuda.Line:  # noqa: N802 - torch's name
        return self.Line()

    class Line:
        def wait_stream(self, other: Cuda.Line) -> None: ...

    @contextmanager
    def stream(self, stream: Cuda.Line) -> Iterator[None]:
        yield

    class CUDAGraph: ...

    @contextmanager
    def graph(self, graph: CUDAGraph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert (pool, capture_error_mode) == ("the pool", "thread_local")
        self.capturing = True
        yield
        self.capturing = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    stand_in = Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", stand_in)
    return stand_in


def working(cuda: Cuda, fails_at: int | None = None, error: Exception | None = None) -> Callable[[int], Callable[[], int]]:
    def make(size: int) -> Callable[[], int]:
        def work() -> int:
            if size == fails_at and error:
                raise error
            cuda.asked.append((size, cuda.capturing))
            return size

        return work

    return make


def test_the_largest_is_recorded_first_and_all_share_one_pool(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorded = record([1, 2, 4], working(cuda), GPU)
    tries = [(size, capturing) for size in (4, 2, 1) for capturing in (False, False, True)]
    assert cuda.asked == ["pool", *tries]
    assert {size: each.result for size, each in recorded.items()} == {1: 1, 2: 2, 4: 4}
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("Decode steps are recorded for 3 sizes, up to 4 sequences")


def test_nothing_to_record_asks_nothing_of_cuda(cuda: Cuda) -> None:
    assert record([], working(cuda), GPU) == {} and not cuda.asked


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory")])
def test_too_little_memory_is_refused(cuda: Cuda, error: Exception) -> None:
    cuda.free = 1
    with pytest.raises(RefusedError) as refused:
        record([1, 64], working(cuda, 64, error), GPU)
    assert str(refused.value) == (
        "Recording a step of 64 sequences does not fit into GPU 3 beside the weights and the KV cache: of 141.0 GB 1.00 "
        "are left. Give the cache less with --kv_cache_memory, or build the engine with a smaller --max_batch_size."
    )
    assert cuda.asked == ["pool"]


def test_other_failures_stay_what_they_are(cuda: Cuda) -> None:
    with pytest.raises(RuntimeError, match="illegal"):
        record([1], working(cuda, 1, RuntimeError("CUDA error: an illegal memory access was encountered")), GPU)


def test_progress_is_told(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    times = iter(range(0, 1000, 4))
    monkeypatch.setattr(graphs.time, "monotonic", lambda: float(next(times)))
    record([1, 2, 4], working(cuda), GPU)
    assert caplog.messages[:-1] == ["2 of 3 sizes of decode steps are recorded."]
