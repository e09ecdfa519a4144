"""What a rank with a GPU does when its cache has its room, and when it leaves."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from arctic_trt.engine.config import read_engine_config
from arctic_trt.errors import RefusedError
from arctic_trt.model.mapping import Mapping
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda import worker as module
from arctic_trt.runtime.cuda.library import Thresholds
from arctic_trt.runtime.cuda.network import CudaNetwork, narrowed, nobodys_step
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.cuda.worker import connect_devices, load_cuda_worker
from arctic_trt.runtime.worker import Worker
from tests.runtime.conftest import Model
from tests.support.cuda_networks import ROOM, twin_worker
from tests.support.engines import build_engine

CPU = torch.device("cpu")


def test_steps_are_recorded_once_the_cache_has_its_room(tiny: Model) -> None:
    worker = twin_worker(tiny.engine("fp8"), SoloCommunicator())
    seen: list[int] = []
    again = Worker(worker.network, on_reserved=lambda: seen.append(worker.room.num_blocks))
    again.reserve(ROOM)
    assert seen == [ROOM.num_blocks]


def test_a_loaded_rank_records_for_its_engines_limits(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_engine(tiny.checkpoint("fp8"), tiny.work_dir / "few", max_batch_size=12, max_num_tokens=600)
    engine = read_engine_config(directory)
    prepared: list[int] = []
    asked: list[Thresholds] = []
    monkeypatch.setattr(module, "make_ops", lambda config, rank, device, thresholds: asked.append(thresholds) or TwinOps())
    monkeypatch.setattr(CudaNetwork, "prepare", lambda self, most_tokens: prepared.append(most_tokens))
    worker = load_cuda_worker(directory, engine, engine.network()[1].rank(0), SoloCommunicator(), CPU)
    assert not prepared and asked == [Thresholds(recorded=12)]
    worker.reserve(ROOM)
    assert prepared == [600] and cast(Any, worker.network)._graphs == [1, 2, 4, 8, 12]


def test_weights_that_do_not_fit_are_refused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    engine = read_engine_config(tiny.engine("fp8"))
    monkeypatch.setattr(module, "make_ops", lambda *arguments: TwinOps())
    monkeypatch.setattr(module, "_Progress", lambda device: None)  # its buffers are pinned
    monkeypatch.setattr(module, "load_rank", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 10**9, 80 * 10**9))
    with pytest.raises(RefusedError, match=r"What rank 0 holds does not fit into GPU 5: of 80\.0 GB 2\.00 are left") as caught:
        load_cuda_worker(tiny.engine("fp8"), engine, engine.network()[1].rank(0), SoloCommunicator(), torch.device("cuda", 5))
    assert caught.value.hint == "Free the GPU, or cut the engine for more ranks."


def test_a_gpus_steps_are_larger_than_a_cpus(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build_engine(tiny.checkpoint("fp8"), tiny.work_dir / "many", max_batch_size=2, max_num_tokens=8192)
    engine = read_engine_config(directory)
    prepared: list[int] = []
    monkeypatch.setattr(module, "make_ops", lambda *arguments: TwinOps())
    monkeypatch.setattr(CudaNetwork, "prepare", lambda self, most_tokens: prepared.append(most_tokens))
    worker = load_cuda_worker(directory, engine, engine.network()[1].rank(0), SoloCommunicator(), CPU)
    worker.reserve(ROOM)
    assert prepared == [worker.step_tokens] == [4096] and Worker.step_tokens == 1024


def test_a_routers_numbers_are_kept_in_bf16_if_it_has_them(tiny: Model) -> None:
    network = twin_worker(tiny.engine("fp8"), SoloCommunicator()).network
    assert isinstance(network, CudaNetwork)
    assert all(layer.router.dtype == torch.bfloat16 for layer in network.weights.layers), "trained in bf16"
    exact, inexact = torch.tensor([[1.5, -0.125]]), torch.tensor([[1.5, 0.1]])
    assert torch.equal(narrowed(exact).float(), exact) and narrowed(exact).dtype == torch.bfloat16
    assert narrowed(inexact) is inexact


def test_prompt_logits_of_the_largest_step_are_those_that_can_be_asked_for() -> None:
    step = nobodys_step([5, 3, 4], 7)
    assert [(chunk.logits_from, chunk.num_logits) for chunk in step.chunks] == [(0, 5), (1, 2), (4, 0)]
    assert nobodys_step([1, 1], 2).num_logits == 2


def test_the_largest_step_may_be_longer_than_a_sequence(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    network = twin_worker(tiny.engine("fp8"), SoloCommunicator()).network
    assert isinstance(network, CudaNetwork)
    ran: list[tuple[int, int]] = []
    run = network._run
    monkeypatch.setattr(network, "_run", lambda step, wanted: ran.append((len(step.token_T), wanted)) or run(step, wanted))
    network.prepare(130)
    assert ran == [(130, 130)]


def test_graphs_are_gone_before_nccl_is(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, order, at_exit = twin_worker(tiny.engine("fp8"), SoloCommunicator()), [], []

    class Devices:
        def __init__(self, comm: object, mapping: object, device: object) -> None:
            order.append("met")

        def close(self) -> None:
            order.append("closed")

    def remember(function: Callable[..., None], *arguments: object) -> None:
        at_exit.append(lambda: function(*arguments))

    monkeypatch.setattr(module, "DeviceCommunicator", Devices)
    monkeypatch.setattr(atexit, "register", remember)
    monkeypatch.setattr(worker.network, "forget", lambda: order.append("forgot"))
    connect_devices(worker, SoloCommunicator(), Mapping(tp_size=1, pp_size=1, moe_tp_size=1, moe_ep_size=1), CPU)
    assert isinstance(cast(Any, worker.network.comm), Devices) and order == ["met"]
    (leave,) = at_exit
    leave()
    assert order == ["met", "forgot", "closed"]
