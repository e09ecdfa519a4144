"""Which way a sum takes, and what the ways do to the tensor, with threads for ranks and stand-ins for torch's operations."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.runtime.cuda import sums
from arctic_trt.runtime.cuda.sums import (
    ALIGNMENT,
    OPERATIONS,
    ROOM,
    SharedSums,
    Way,
    describe_obstacle,
    find_missing_operation,
    plan_sum,
    share_memory,
)

HIDDEN = 7168


@pytest.mark.parametrize(
    ("tokens", "dtype", "ranks", "multicast", "way"),
    [
        (1, torch.float32, 8, True, Way.ONE_SHOT),
        (5, torch.float32, 8, True, Way.ONE_SHOT),
        (8, torch.float32, 8, True, Way.MULTICAST),
        (16, torch.float32, 8, False, Way.TWO_SHOT),
        (1024, torch.bfloat16, 8, True, Way.MULTICAST),
        (1024, torch.bfloat16, 8, False, Way.LIBRARY),
        (4096, torch.bfloat16, 8, True, Way.LIBRARY),
        (32, torch.float32, 2, True, Way.ONE_SHOT),
        (128, torch.float32, 2, True, Way.TWO_SHOT),
        (64, torch.float32, 7, False, Way.LIBRARY),
    ],
)
def test_the_way_of_a_step(tokens: int, dtype: torch.dtype, ranks: int, multicast: bool, way: Way) -> None:
    assert plan_sum(tokens * HIDDEN * dtype.itemsize, ranks, multicast=multicast) is way


@given(st.integers(1, 2 * ROOM), st.integers(2, 16), st.booleans())
def test_what_does_not_fit_is_the_librarys(num_bytes: int, ranks: int, multicast: bool) -> None:
    way = plan_sum(num_bytes, ranks, multicast=multicast)
    if num_bytes > ROOM or num_bytes % ALIGNMENT:
        assert way is Way.LIBRARY
    if way is Way.MULTICAST:
        assert multicast
    smaller = plan_sum(max(ALIGNMENT, num_bytes // 2 // ALIGNMENT * ALIGNMENT), ranks, multicast=multicast)
    order = [Way.ONE_SHOT, Way.MULTICAST, Way.TWO_SHOT, Way.LIBRARY]
    assert num_bytes % ALIGNMENT or order.index(smaller) <= order.index(way)


@pytest.mark.parametrize(
    ("hosts", "links", "lacks", "said"),
    [
        (1, "NV18 between all 8", None, None),
        (2, "NV18 between all 8", None, "a tensor-parallel group is on 2 hosts"),
        (1, "PCIe only", None, "NVLink does not connect all GPUs (PCIe only)"),
        (1, "NV4 between 4 of 28 pairs, the others by PCIe", None, "NVLink does not connect all GPUs (NV4 between 4 of"),
        (1, None, None, "NVLink does not connect all GPUs (nvidia-smi does not say what does)"),
        (1, "NV18 between all 8", "two_shot_all_reduce_out", "has no two_shot_all_reduce_out"),
    ],
)
def test_why_memory_is_not_shared(hosts: int, links: str | None, lacks: str | None, said: str | None) -> None:
    found = describe_obstacle(hosts, links, lacks)
    assert found == said if said is None else said in (found or "")


def test_torch_has_the_operations_with_these_arguments() -> None:
    assert find_missing_operation() is None
    names = {name: [each.name for each in getattr(torch.ops.symm_mem, name).default._schema.arguments] for name in OPERATIONS}
    assert names == {
        "one_shot_all_reduce_copy_out": ["symm_buffer", "local_input", "reduce_op", "group_name", "out"],
        "two_shot_all_reduce_out": ["input", "reduce_op", "group_name", "output"],
        "multimem_all_reduce_": ["input", "reduce_op", "group_name"],
    }


def test_an_older_torch_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "OPERATIONS", ("one_shot_all_reduce_copy_out", "not_yet_there"))
    assert find_missing_operation() == "not_yet_there"


class Operations:
    """One rank's, among threads; memory is shared by looking into one another's."""

    def __init__(self, rank: int, memory: list[Tensor], barrier: threading.Barrier) -> None:
        self._rank, self._memory, self._barrier = rank, memory, barrier
        self.called: list[str] = []

    def _sum(self, symmetric: Tensor) -> Tensor:
        assert symmetric.untyped_storage().data_ptr() == self._memory[self._rank].untyped_storage().data_ptr()
        assert symmetric.is_contiguous() and symmetric.storage_offset() == 0
        self._barrier.wait(10)
        parts = [part[: symmetric.nbytes].view(symmetric.dtype).view(symmetric.shape) for part in self._memory]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        self._barrier.wait(10)
        return total

    def one_shot_all_reduce_copy_out(
        self, symm_buffer: Tensor, local_input: Tensor, reduce_op: str, group: str, out: Tensor
    ) -> None:
        assert (reduce_op, group, out.shape) == ("sum", "g", symm_buffer.shape)
        self.called.append("one shot")
        symm_buffer.copy_(local_input)
        out.copy_(self._sum(symm_buffer))

    def two_shot_all_reduce_out(self, input: Tensor, reduce_op: str, group: str, output: Tensor) -> None:
        assert (reduce_op, group, output.shape) == ("sum", "g", input.shape)
        self.called.append("two shots")
        output.copy_(self._sum(input))

    def multimem_all_reduce_(self, input: Tensor, reduce_op: str, group: str) -> None:
        assert (reduce_op, group) == ("sum", "g")
        self.called.append("multicast")
        input.copy_(self._sum(input))


@pytest.mark.parametrize("multicast", [True, False])
def test_sums_are_in_place_and_the_same_bits_for_all(multicast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "ONE_SHOT_BYTES", 4096)
    ranks, sizes = 4, ((3, 64), (8, 256), (1, 4))
    memory = [torch.full((1 << 16,), rank, dtype=torch.uint8) for rank in range(ranks)]
    barrier = threading.Barrier(ranks)
    operations = [Operations(rank, memory, barrier) for rank in range(ranks)]

    def draw(rank: int, place: int) -> Tensor:
        return torch.randn(sizes[place], generator=torch.Generator().manual_seed(rank + 10 * place)) * 10.0**rank

    def work(rank: int) -> list[Tensor]:
        shared = SharedSums(memory[rank], "g", ranks, operations[rank], multicast=multicast)
        found = [draw(rank, place) for place in range(len(sizes))]
        for x in found:
            shared.add_up(x, shared.plan(x))
        return found

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(work, range(ranks)))
    for place in range(len(sizes)):
        parts = [draw(rank, place) for rank in range(ranks)]
        expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
        assert all(mine[place].equal(expected) for mine in found)
    assert operations[0].called == ["one shot", "multicast" if multicast else "two shots", "one shot"]


def test_what_the_kernels_cannot_take_is_the_librarys() -> None:
    operations: Any = SimpleNamespace()
    shared = SharedSums(torch.empty(ROOM, dtype=torch.uint8), "g", 8, operations, multicast=True)
    assert shared.plan(torch.empty(1, HIDDEN)) is Way.ONE_SHOT
    assert shared.plan(torch.empty(1, HIDDEN, dtype=torch.float64)) is Way.LIBRARY
    assert shared.plan(torch.empty(HIDDEN + 1)[1:]) is Way.LIBRARY
    assert shared.plan(torch.empty(3)) is Way.LIBRARY


@pytest.mark.parametrize("address", [0, 1 << 40])
def test_memory_is_made_and_met_over(address: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import _symmetric_memory

    met: list[tuple[int, object]] = []

    def meet(buffer: Tensor, group: object) -> SimpleNamespace:
        met.append((buffer.nbytes, group))
        return SimpleNamespace(multicast_ptr=address)

    monkeypatch.setattr(_symmetric_memory, "rendezvous", meet)
    monkeypatch.setattr(_symmetric_memory, "empty", torch.empty)
    group = SimpleNamespace(group_name="7")
    shared = share_memory(group, 8, torch.device("cpu"))
    assert met == [(ROOM, group)]
    assert shared.plan(torch.empty(64, HIDDEN)) is (Way.MULTICAST if address else Way.TWO_SHOT)
