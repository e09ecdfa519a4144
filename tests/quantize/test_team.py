"""Work is divided without gaps, and what crosses between processes does not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import RefusedError
from arctic_trt.launch import Launch
from arctic_trt.quantize import team
from arctic_trt.quantize.mpi import join_team
from arctic_trt.quantize.rows import MemoryRows
from arctic_trt.quantize.team import MpiTeam, Solo, Team, share_of

Value = TypeVar("Value")


class Threads:
    """The part of an MPI communicator that a team uses, with threads for ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def run(self, work: Callable[[MpiTeam], Value]) -> list[Value]:
        """Results of ``work`` on every rank."""
        results: list[Any] = [None] * self.size

        def member(rank: int) -> None:
            results[rank] = work(MpiTeam(_Comm(self, rank)))

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class _Comm:
    def __init__(self, world: Threads, rank: int) -> None:
        self.world, self.rank, self.size = world, rank, world.size

    def allgather(self, value: Any) -> list[Any]:
        self.world.slots[self.rank] = value
        self.world.barrier.wait()
        found = list(self.world.slots)
        self.world.barrier.wait()
        return found

    def bcast(self, value: Any, root: int) -> Any:
        return self.allgather(value)[root]

    def Barrier(self) -> None:  # noqa: N802 - mpi4py's name
        self.world.barrier.wait()

    def Bcast(self, array: np.ndarray[Any, Any], root: int) -> None:  # noqa: N802
        array[...] = self.allgather(array.copy())[root]

    def Allreduce(self, x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:  # noqa: N802
        parts = self.allgather(x.copy())
        out[...] = sum(parts[1:], start=parts[0])


SIZES = (1, 2, 3, 5)


@pytest.fixture(params=SIZES)
def world(request: pytest.FixtureRequest) -> Threads:
    return Threads(request.param)


@given(st.integers(0, 200), st.integers(1, 70))
def test_shares_are_contiguous_and_differ_by_at_most_one(count: int, size: int) -> None:
    shares = [share_of(count, member, size) for member in range(size)]
    assert [thing for share in shares for thing in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_does_everything_itself() -> None:
    solo: Team = Solo()
    x, values = torch.ones(2), {"a": torch.ones(())}
    assert solo.share(7) == range(7) and solo.sum(x) is x and solo.maximum(values) is values
    assert solo.gather(4) == [4] and solo.broadcast(4) == 4 and (solo.rank, solo.size) == (0, 1)
    rows = MemoryRows(2, 2)
    rows.write(0, torch.ones(2, 2).bfloat16())
    solo.exchange(rows, [(0, 2)])
    solo.add_up(rows, 2)
    solo.barrier()
    assert rows.read(0, 2).equal(torch.ones(2, 2).bfloat16())


def test_a_team_of_threads_knows_its_members(world: Threads) -> None:
    assert world.run(lambda team: (team.rank, team.size)) == [(rank, world.size) for rank in range(world.size)]
    assert world.run(lambda team: team.gather(team.rank)) == [list(range(world.size))] * world.size
    assert world.run(lambda team: team.broadcast(team.rank)) == [0] * world.size
    assert world.run(lambda team: team.share(7, 0)) == [share_of(7, 0, world.size)] * world.size


def test_sums_and_maxima(world: Threads) -> None:
    def work(team: MpiTeam) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = {"all": torch.tensor(float(team.rank % 3)), f"only {team.rank}": torch.tensor(1.0)}
        return team.sum(torch.arange(6).view(2, 3).T + team.rank), team.maximum(values)

    size = world.size
    for total, highest in world.run(work):
        assert total.equal(size * torch.arange(6).view(2, 3).T + sum(range(size)))
        assert highest["all"] == min(2, size - 1) and len(highest) == size + 1


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_rows_are_exchanged(world: Threads, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "CHUNK_ROWS", chunk)
    expected = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    ranges = [(share.start, share.stop) for share in (share_of(11, rank, world.size) for rank in range(world.size))]

    def work(team: MpiTeam) -> torch.Tensor:
        rows, (begin, end) = MemoryRows(11, 3), ranges[team.rank]
        rows.write(begin, expected[begin:end])
        team.exchange(rows, ranges)
        return rows.read(0, 11)

    assert all(found.equal(expected) for found in world.run(work))


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_a_sum_of_two_is_that_of_one_process(world: Threads, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experts add to each token; wherever they are, the sum is rounded as where both are here."""
    monkeypatch.setattr(team, "CHUNK_ROWS", chunk)
    draw = torch.Generator().manual_seed(1)
    parts = [(torch.randn(9, 4, generator=draw) * 10.0**scale).bfloat16() for scale in (0, -2)]
    alone = MemoryRows(9, 4)
    for part in parts:
        alone.add(torch.arange(9), part)
    home = torch.randint(0, world.size, (2, 9), generator=draw)

    def work(team: MpiTeam) -> torch.Tensor:
        rows = MemoryRows(9, 4)
        for part, homes in zip(parts, home, strict=True):
            mine = (homes == team.rank).nonzero().flatten()
            rows.add(mine, part[mine])
        team.add_up(rows, 9)
        return rows.read(0, 9)

    assert all(found.equal(alone.read(0, 9)) for found in world.run(work))


@pytest.mark.parametrize("launch", [None, Launch(0, 1, 1)])
def test_a_process_alone_needs_no_mpi(launch: Launch | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    assert isinstance(join_team(launch, 2), Solo)


def test_several_processes_need_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(RefusedError, match=r"needs mpi4py and an MPI library .*pip install 'arctic-trt\[mpi\]'"):
        join_team(Launch(1, 4, 4), 2)


def test_a_sum_of_three_is_refused() -> None:
    """It would depend on who adds what."""
    with pytest.raises(RefusedError, match="num_experts_per_tok=3: beyond 2 the order of additions would depend on the number"):
        join_team(Launch(0, 2, 2), 3)
    assert isinstance(join_team(None, 3), Solo)
