"""The forward pass of the GPU's network, with the operations' twins, against the CPU's."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.engine.config import read_engine_config
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda.network import CudaNetwork
from arctic_trt.runtime.step import Step
from arctic_trt.runtime.worker import Worker, load_worker
from tests.runtime.conftest import Model
from tests.runtime.test_network import lead
from tests.support.cuda_networks import ROOM, chunk, mixed_steps, repeat_on_cpu, twin_worker

RECIPES = {"fp8": {}, "kv_float": {"kv_cache_dtype": "none"}, "bf16": {"qformat": "full_prec"}}


def networks(model: Model, name: str, graphs: tuple[int, ...] = ()) -> tuple[Worker, Worker]:
    """The CPU's, and the GPU's with twins."""
    engine_dir = model.engine(name, **RECIPES[name])
    config, mapping, quant = read_engine_config(engine_dir).network()
    ours = load_worker(engine_dir, config, quant, mapping.rank(0), SoloCommunicator())
    ours.reserve(ROOM)
    return ours, twin_worker(engine_dir, SoloCommunicator(), graphs)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", ["tiny", "unlike"])
def test_logits_are_the_cpus(shape: str, name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(shape)
    ours, theirs = networks(model, name)
    for step in mixed_steps(model.prompts(30, 9, 100))[:-1]:
        wanted, found = lead(ours, step), lead(theirs, step)
        assert found.shape == wanted.shape
        error_W = (found - wanted).abs().mean(-1)
        assert error_W.median() <= 0.01  # activations of bf16 weights are bf16; now and then a code rounds to its neighbour
        assert error_W.mean() <= 0.05


def test_recorded_steps_are_the_same_and_leave_nothing_behind(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs for 2 and 4 sequences take steps of 1, 3 and 2; what is filled up touches no block of anybody."""
    repeated = repeat_on_cpu(monkeypatch)
    one, other, third = tiny.prompts(30, 9, 24)
    steps = [
        Step(chunks=(chunk(0, one, 0, 20), chunk(1, other, 0, 8), chunk(2, third, 0, 16))),
        Step(chunks=(chunk(2, third, 16, 17),)),
        Step(chunks=(chunk(0, one, 20, 21), chunk(1, other, 8, 9), chunk(2, third, 17, 18))),
        Step(chunks=(chunk(0, one, 21, 22), chunk(2, third, 18, 19))),
    ]
    plain, recorded = networks(tiny, "fp8")[1], networks(tiny, "fp8", graphs=(2, 4))[1]
    network = recorded.network
    assert isinstance(network, CudaNetwork)
    for pages in (*network.cache.pages, *plain.network.cache.pages):
        pages.view(torch.uint8).zero_()
    network.prepare(48)
    assert [len(each.result[0]) for each in repeated] == sorted((len(each.result[0]) for each in repeated), reverse=True)
    for step in steps:
        assert lead(recorded, step).equal(lead(plain, step))
    for mine, theirs in zip(network.cache.pages, plain.network.cache.pages, strict=True):
        assert mine.view(torch.uint8)[:-1].equal(theirs.view(torch.uint8)[:-1])  # all but the spare block
    assert [each.replays for each in repeated] == [1, 2]  # largest first
    network.forget()
    assert recorded.lead(Step(chunks=(chunk(2, third, 19, 20),))) is not None
    assert [each.replays for each in repeated] == [1, 2]


def test_a_layer_of_a_decode_step_is_ten_launches(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/cuda.md says: seven one after another, and three beside them."""
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    from arctic_trt.runtime.cuda.kernels import norm
    from arctic_trt.runtime.cuda.triton_ops import TritonOps

    launched: list[str] = []
    kind = type(norm.norm_kernel)
    monkeypatch.setattr(
        kind, "__getitem__", lambda self, grid: lambda *arguments, **options: launched.append(self.fn.__name__), raising=False
    )
    _, theirs = networks(tiny, "fp8")
    network = theirs.network
    assert isinstance(network, CudaNetwork)
    network._ops = TritonOps(early=False)
    theirs.lead(Step(chunks=(chunk(0, tiny.prompts(2)[0], 0, 1),)))
    aside, beside = ["route", "skinny", "skinny"], ["skinny", "attend", "skinny"]
    layer = ["norm", *aside, *beside, "norm", "skinny", "skinny"]
    assert launched == [f"{name}_kernel" for name in ["embed", *layer * len(network.weights.layers), "norm", "skinny"]]
