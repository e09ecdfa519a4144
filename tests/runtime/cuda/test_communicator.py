"""The communicator of GPUs, over another library than theirs, and networks cut over its ranks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda import communicator
from arctic_trt.runtime.cuda.communicator import DeviceCommunicator
from arctic_trt.runtime.cuda.network import EXACT_SUM_TOKENS
from arctic_trt.runtime.cuda.sums import Way
from tests.runtime.conftest import Model
from tests.runtime.test_network import lead
from tests.support.cuda_networks import mixed_steps, twin_worker
from tests.support.engines import mpirun

CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-tp2pp2": ("tiny", {"tp_size": 2, "pp_size": 2}),
    "tiny-tp4ep2": ("tiny", {"tp_size": 4, "moe_ep_size": 2}),
    "unlike-tp4": ("unlike", {"tp_size": 4}),
    "tiny-tp2": ("tiny", {"tp_size": 2}),
    "tiny-pp2": ("tiny", {"tp_size": 1, "pp_size": 2}),
}
ROUNDS = [["tiny-tp2pp2"], ["tiny-tp4ep2"], ["unlike-tp4"], ["tiny-tp2", "tiny-pp2"]]
MEDIAN, MOST = 1e-2, 5e-2
"""Of the largest logit: where sums are of other parts, now and then an activation rounds to the neighbouring code."""
ROUNDED = 5
"""So many times more often, where parts and sums are bf16."""


@pytest.fixture(scope="module")
def found(tiny: Model, unlike: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks left what they computed."""
    work_dir = tmp_path_factory.mktemp("device_ranks")
    models = {"tiny": tiny, "unlike": unlike}

    def world(name: str) -> list[Any]:
        model, sizes = CUTS[name]
        return [model, str(models[model].engine(name, **sizes)), sizes["tp_size"] * sizes.get("pp_size", 1), name]

    plan = {
        "prompts": {name: model.prompts(30, 9, 100) for name, model in models.items()},
        "rounds": [[world(name) for name in names] for names in ROUNDS],
    }
    (work_dir / "plan.json").write_text(json.dumps(plan))
    began = time.monotonic()
    job = mpirun(4, "-m", "mpi4py", "-m", "tests.support.device_ranks", work_dir)
    assert job.out.strip() == "all agree", job.err
    (work_dir / "end.json").write_text(json.dumps([job.code, job.err, time.monotonic() - began]))
    return work_dir


@pytest.mark.mpi
@pytest.mark.parametrize("name", CUTS)
def test_logits_do_not_depend_on_the_cut(name: str, found: Path, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(CUTS[name][0])
    one_rank = twin_worker(model.engine("fp8"), SoloCommunicator())
    with np.load(found / f"{name}.npz") as arrays:
        logits = [torch.from_numpy(arrays[key]) for key in arrays.files]
    steps = mixed_steps(model.prompts(30, 9, 100))
    assert len(logits) == len(steps)
    for step, mine in zip(steps, logits, strict=True):
        expected = lead(one_rank, step)
        assert mine.shape == expected.shape
        if "tp_size" in CUTS[name][1] and CUTS[name][1]["tp_size"] == 1:
            assert mine.equal(expected)
            continue
        error_W = (mine - expected).abs().amax(-1) / expected.abs().max()
        times = 1 if step.num_tokens <= EXACT_SUM_TOKENS else ROUNDED
        assert error_W.median() <= MEDIAN * times and error_W.max() <= MOST * times


@pytest.mark.mpi
def test_a_rank_that_dies_ends_those_that_wait_for_a_device(found: Path) -> None:
    code, said, seconds = json.loads((found / "end.json").read_text())
    assert code != 0 and re.search(r"process rank 3 with PID \d+.*signal 9", said, re.DOTALL)
    assert seconds < 50


@pytest.fixture
def alone() -> Iterator[DeviceCommunicator]:
    mapping = Mapping(tp_size=1, pp_size=1, moe_tp_size=1, moe_ep_size=1)
    comm = DeviceCommunicator(SoloCommunicator(), mapping, torch.device("cpu"), backend="gloo")
    yield comm
    comm.close()


@pytest.mark.parametrize(
    ("links", "failure", "said"),
    [
        ("NV18 between all 8", None, None),
        ("PCIe only", None, "NVLink does not connect all GPUs (PCIe only)."),
        ("NV18 between all 8", RuntimeError("no fabric handle\nframe #0"), "no fabric handle."),
    ],
)
def test_memory_is_shared_where_that_works(
    links: str,
    failure: RuntimeError | None,
    said: str | None,
    alone: DeviceCommunicator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def share(group: object, ranks: int, device: torch.device) -> str:
        if failure:
            raise failure
        return "shared"

    monkeypatch.setattr(communicator, "query_links", lambda: links)
    monkeypatch.setattr(communicator, "share_memory", share)
    assert alone._share() == (None if said else "shared")
    assert caplog.messages == ([f"Small sums take NCCL's way, which takes longer: {said}"] if said else [])


def test_nccl_can_be_asked_for(
    alone: DeviceCommunicator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ARCTIC_TRT_GPU_SUMS", "nccl")
    monkeypatch.setattr(communicator, "query_links", lambda: pytest.fail("nobody asked"))
    assert alone._share() is None and not caplog.messages
    monkeypatch.setenv("ARCTIC_TRT_GPU_SUMS", "fast")
    with pytest.raises(UsageError, match="ARCTIC_TRT_GPU_SUMS=fast is none of auto, nccl"):
        alone._share()


def test_each_sum_takes_its_way(alone: DeviceCommunicator, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []

    class Sums:
        def plan(self, x: torch.Tensor) -> Way:
            return Way.ONE_SHOT if x.nbytes < 100 else Way.LIBRARY

        def add_up(self, x: torch.Tensor, way: Way) -> None:
            taken.append((way.value, x.nbytes))

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: taken.append(("nccl", x.nbytes)))
    alone._size = 2
    alone.all_reduce(torch.empty(4))
    alone._sums = cast(Any, Sums())
    alone.all_reduce(torch.empty(4))
    alone.all_reduce(torch.empty(400))
    assert taken == [("nccl", 16), ("one shot", 16), ("nccl", 1600)]


def test_wrong_sums_are_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceCommunicator, "all_reduce", lambda self, x: x.add_(1))
    mapping = Mapping(tp_size=1, pp_size=1, moe_tp_size=1, moe_ep_size=1)
    with pytest.raises(RefusedError, match=r"Sums of 1024 bytes over 1 ranks come out wrong on .*, cpu"):
        DeviceCommunicator(SoloCommunicator(), mapping, torch.device("cpu"), backend="gloo")
    torch.distributed.destroy_process_group()


def test_a_second_world_beside_the_first_is_refused_in_a_sentence(alone: DeviceCommunicator) -> None:
    mapping = Mapping(tp_size=1, pp_size=1, moe_tp_size=1, moe_ep_size=1)
    with pytest.raises(RefusedError, match="cannot join the other ranks over GLOO: trying to initialize"):
        DeviceCommunicator(SoloCommunicator(), mapping, torch.device("cpu"), backend="gloo")


def test_sums_that_differ_between_ranks_are_found(alone: DeviceCommunicator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert alone._rehearse() == []
    alone._size = 2
    monkeypatch.setattr(alone, "all_reduce", lambda x: x.mul_(3))
    monkeypatch.setattr(alone, "all_gather", lambda x: x)
    assert alone._rehearse() == []
    monkeypatch.setattr(alone, "gather_all", lambda value: [value, value + 1])
    assert alone._rehearse() == [1024]


@pytest.mark.parametrize(
    ("tp_size", "world_size", "pairs"),
    [(4, 4, []), (1, 3, [(0, 1), (1, 2), (2, 0)]), (2, 4, [(0, 2), (1, 3), (2, 0), (3, 1)])],
)
def test_neighbours_are_those_that_speak_in_a_step(
    tp_size: int, world_size: int, pairs: list[tuple[int, int]], alone: DeviceCommunicator
) -> None:
    alone._size, alone.world_size = tp_size, world_size
    assert alone._neighbours() == pairs
