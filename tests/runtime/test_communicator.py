"""Worlds of the right size, and failures that all ranks hear of. What MPI itself does is tested under mpirun."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError, UsageError
from arctic_trt.launch import Launch
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime import communicator
from arctic_trt.runtime.communicator import SoloCommunicator, agreement, check_world, connect


def mapping(tp: int, pp: int = 1) -> Mapping:
    return Mapping(tp_size=tp, pp_size=pp, moe_tp_size=tp, moe_ep_size=1)


class OneOf(SoloCommunicator):
    """A rank whose fellows report what the test says."""

    def __init__(self, others: list[Any]) -> None:
        self.others = others
        self.world_size = 1 + len(others)

    def gather_all(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_a_world_of_one_needs_no_mpi() -> None:
    comm = connect(mapping(1), {})
    assert isinstance(comm, SoloCommunicator)
    assert isinstance(connect(mapping(1), {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}), SoloCommunicator)
    x = torch.ones(2, 3)
    comm.all_reduce(x)
    assert x.equal(torch.ones(2, 3)) and comm.all_gather(x).equal(x)
    assert comm.broadcast(np.array([3], np.int32)).tolist() == [3]
    assert comm.gather_all("a") == ["a"]


@pytest.mark.parametrize(
    ("needs", "launch", "complaint"),
    [
        (mapping(8), None, "needs 8 ranks (tp 8 x pp 1), got 1. Start it as: mpirun -n 8 --allow-run-as-root arctic-trt"),
        (mapping(2, 2), Launch(0, 8, None), "needs 4 ranks (tp 2 x pp 2), got 8"),
        (mapping(1), Launch(0, 2, None), "needs 1 rank (tp 1 x pp 1), got 2. Start it without mpirun."),
    ],
)
def test_wrong_worlds_are_refused(needs: Mapping, launch: Launch | None, complaint: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_world(needs, launch)
    assert complaint in str(caught.value) and caught.value.exit_code == 3


def test_right_and_unknown_worlds_pass() -> None:
    check_world(mapping(1), None)
    check_world(mapping(4), Launch(1, 4, 4))
    check_world(mapping(4), Launch(1, None, None))


def test_alone_an_error_stays_as_it_is() -> None:
    with pytest.raises(CheckpointError, match=r"^broken$"), agreement(SoloCommunicator()):
        raise CheckpointError("broken")


def test_all_ranks_fail_with_the_lowest_failing_ranks_words() -> None:
    comm = OneOf([None, ("second", "hint 2", 1), ("third", "", 3)])
    with pytest.raises(ArcticTrtError) as caught, agreement(comm):
        pass
    assert str(caught.value) == "rank 2: second hint 2" and caught.value.exit_code == 1
    with pytest.raises(ArcticTrtError) as caught, agreement(comm):
        raise RefusedError("first", "hint 0")
    assert str(caught.value) == "rank 0: first hint 0" and caught.value.exit_code == 3


def test_wrong_usage_is_no_ranks_fault() -> None:
    with pytest.raises(ArcticTrtError) as caught, agreement(OneOf([None])):
        raise UsageError("no such flag")
    assert str(caught.value) == "no such flag" and caught.value.exit_code == 2


def test_agreement_lets_success_and_surprises_pass() -> None:
    with agreement(OneOf([None, None])):
        pass
    with pytest.raises(ZeroDivisionError), agreement(OneOf([("must not be asked for", "", 1)])):
        raise ZeroDivisionError


@pytest.mark.parametrize("there_s", [0.0015, 0.005, 0.03, 1.0, 5.0])
def test_waiting_is_awake_for_a_moment_and_then_asleep(there_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is late by more than a fiftieth of the wait, nor by more than a nap of 2 ms, and who waits for long is idle."""
    now, naps, yielded = [0.0], [], []
    look_s = 2e-6

    class Request:
        def Test(self) -> bool:  # noqa: N802 - mpi4py's name
            now[0] += look_s
            return now[0] >= there_s

    def sleep(seconds: float) -> None:
        naps.append((now[0], seconds))
        now[0] += seconds

    monkeypatch.setattr(communicator.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(communicator.time, "sleep", sleep)
    monkeypatch.setattr(communicator.os, "sched_yield", lambda: yielded.append(now[0]))
    communicator._wait(Request(), communicator.AWAKE_S)
    assert max(yielded) < communicator.AWAKE_S <= min((begin for begin, _ in naps), default=communicator.AWAKE_S)
    assert now[0] - there_s <= min(communicator.WAIT_S, communicator.NAP_SHARE * there_s) + 2 * look_s
    assert all(seconds <= communicator.WAIT_S for _, seconds in naps) and (len(naps) + 1) * 20e-6 < 0.005 + 0.02 * there_s
