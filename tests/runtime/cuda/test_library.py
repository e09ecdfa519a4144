"""Products by the library and what lies between them, against the operations' twins."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.errors import UsageError
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.quantize.fp8 import amax, cast_e4m3, scale_from_amax
from arctic_trt.report.arctic import RELEASED
from arctic_trt.runtime.communicator import SoloCommunicator
from arctic_trt.runtime.cuda import library
from arctic_trt.runtime.cuda.between import TwinBetween
from arctic_trt.runtime.cuda.library import LibraryOps, SortedRouted, Thresholds, plan_dense, plan_experts
from arctic_trt.runtime.cuda.network import CudaNetwork
from arctic_trt.runtime.cuda.ops import FusedOps
from arctic_trt.runtime.cuda.products import FUNCTIONS, Abilities, TorchProducts
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.kernels import Projection
from tests.runtime.conftest import Model
from tests.runtime.test_network import lead
from tests.support.cuda_networks import mixed_steps, twin_worker
from tests.support.torch_library import RoundedTwin, TorchLibrary

HIDDEN, FFN, EXPERTS = 48, 32, 6
ALL = Abilities(fp8=True, bf16=True, grouped=True)
RECIPES = {"fp8": {}, "bf16": {"qformat": "full_prec"}}
ALWAYS = Thresholds(dense_rows=1, expert_rows=0)
USUAL = Thresholds()
TWIN = TwinOps()


def joined(thresholds: Thresholds = ALWAYS, few: FusedOps = TWIN, ffn: int = FFN) -> tuple[LibraryOps, TorchLibrary]:
    """Operations whose library is a stand-in, and the stand-in."""
    torch_library = TorchLibrary()
    products = TorchProducts(torch.device("cpu"), torch_library)
    return LibraryOps(few, products, TwinBetween(), ALL, ffn=ffn, thresholds=thresholds), torch_library


def projection(*shape: int, fp8: bool) -> Projection:
    weight = torch.randn(shape) / shape[-1] ** 0.5
    if not fp8:
        return Projection(weight.bfloat16())
    scale, given_scale = scale_from_amax(amax(weight)), torch.tensor([0.01])
    alpha = (scale * given_scale).reshape(1) if len(shape) == 2 else scale * given_scale * torch.rand(shape[0], 1)
    return Projection(cast_e4m3(weight, scale), given_scale, alpha)


def codes(rows: int, length: int, reader: Projection) -> Tensor:
    x = torch.randn(rows, length)
    return x.bfloat16() if reader.input_scale is None else cast_e4m3(x, reader.input_scale)


def experts_of(ops: FusedOps, x: Tensor, router: Tensor, experts: range, fp8: bool) -> Tensor:
    """All that experts add to the residual MLP's part, in float32."""
    torch.manual_seed(1)
    fc, proj = projection(len(experts), 2 * FFN, HIDDEN, fp8=fp8), projection(len(experts), HIDDEN, FFN, fp8=fp8)
    routed = ops.route(x, router, 2, experts)
    slots = ops.expert_project(ops.expert_gated(codes(len(x), HIDDEN, fc), routed, fc, proj), routed, proj)
    residual = projection(HIDDEN, FFN, fp8=fp8)
    return ops.project_and_combine(codes(len(x), FFN, residual), residual, slots, routed, torch.float32)


def assert_like(found: Tensor, rounded: Tensor, exact: Tensor) -> None:
    """What is computed with products in bf16, and that is, but for codes that round to their neighbours, what it should be."""
    torch.testing.assert_close(found, rounded, rtol=1e-4, atol=1e-4)
    assert (found - exact).abs().mean() <= 0.03 * exact.abs().mean()


@pytest.mark.parametrize(
    ("rows", "weight", "fp8", "wanted"),
    [
        (128, (1152, 7168), True, True),
        (127, (1152, 7168), True, False),
        (128, (40, 64), True, False),
        (128, (64, 40), True, False),
        (128, (40, 72), False, True),
    ],
)
def test_dense_products_of_many_rows_go_to_the_library(rows: int, weight: tuple[int, int], fp8: bool, wanted: bool) -> None:
    assert plan_dense(rows, weight, fp8, ALL, USUAL) is wanted
    assert not plan_dense(rows, weight, fp8, Abilities(fp8=not fp8, bf16=fp8, grouped=True), USUAL)


@pytest.mark.parametrize(
    ("tokens", "sizes", "wanted"),
    [
        (1024, (7168, 608), True),
        (1023, (7168, 608), False),
        (4096, (7168, 4864), True),
        (4096, (7168, 600), False),
        (4096, (7160, 608), False),
        (4096, (1 << 16, 608), False),
    ],
)
def test_many_rows_an_expert_go_to_the_library(tokens: int, sizes: tuple[int, int], wanted: bool) -> None:
    assert plan_experts(tokens, 2, 128, sizes, ALL, USUAL) is wanted
    assert not plan_experts(tokens, 2, 128, sizes, replace(ALL, grouped=False), USUAL)
    assert not plan_experts(tokens, 2, 128, sizes, ALL, Thresholds(recorded=tokens))
    assert plan_experts(tokens, 2, 128, sizes, ALL, Thresholds(recorded=tokens - 1)) is wanted


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 20])
def test_dense(tokens: int, dtype: torch.dtype, fp8: bool) -> None:
    ops, called = joined()
    fc, proj = projection(2 * FFN, HIDDEN, fp8=fp8), projection(HIDDEN, FFN, fp8=fp8)
    x = codes(tokens, HIDDEN, fc)
    torch.testing.assert_close(ops.project(x, fc, dtype), TWIN.project(x, fc, dtype), rtol=8e-3, atol=1e-5)
    found, wanted = ops.gated(x, fc, proj), TWIN.gated(x, fc, proj)
    assert found.dtype == wanted.dtype
    assert torch.equal(found.float(), wanted.float()), "what is rounded is a sum in float32"
    assert called.calls == (["_scaled_mm"] if fp8 else ["mm"]) * 2


@pytest.mark.parametrize("fp8", [True, False])
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_experts(fp8: bool, data: st.DataObject) -> None:
    """Over random routings: of one token, without a token for some experts, without an expert for some tokens."""
    tokens = data.draw(st.sampled_from([1, 2, 7, 33]))
    first = data.draw(st.integers(0, EXPERTS - 1))
    experts = range(first, data.draw(st.integers(first + 1, EXPERTS)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    x, router = torch.randn(tokens, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    ops, called = joined()
    assert_like(*(experts_of(each, x, router, experts, fp8) for each in (ops, RoundedTwin(), TWIN)))
    grouped, dense = ("_scaled_grouped_mm", "_scaled_mm") if fp8 else ("_grouped_mm", "mm")
    assert called.calls == ["mm", grouped, grouped, dense]


@pytest.mark.parametrize("experts", [range(6), range(2, 3), range(4, 6)])
def test_all_tokens_may_go_to_the_same_experts(experts: range) -> None:
    x, router = torch.rand(40, HIDDEN), torch.randn(EXPERTS, HIDDEN) * 0.01
    router[2], router[5] = 0.5, 0.4
    assert_like(*(experts_of(ops, x, router, experts, True) for ops in (joined()[0], RoundedTwin(), TWIN)))


def test_experts_that_are_not_held_are_not_multiplied() -> None:
    router = torch.zeros(EXPERTS, HIDDEN)
    router[0], router[1] = 1.0, 0.5
    routed = joined()[0].route(torch.rand(9, HIDDEN), router, 2, range(2, 6))
    assert isinstance(routed, SortedRouted) and routed.order.end_E.tolist() == [0, 0, 0, 0]


def test_few_rows_and_odd_shapes_take_the_kernels() -> None:
    ops, called = joined(Thresholds(dense_rows=10, expert_rows=4))
    assert isinstance(ops.route(torch.randn(12, HIDDEN), torch.randn(EXPERTS, HIDDEN), 2, range(EXPERTS)), SortedRouted)
    called.calls.clear()
    x, router = torch.randn(9, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    assert torch.equal(experts_of(ops, x, router, range(EXPERTS), True), experts_of(TWIN, x, router, range(EXPERTS), True))
    odd, proj = projection(40, 24, fp8=True), projection(24, 20, fp8=True)
    x = codes(30, 24, odd)
    assert torch.equal(ops.project(x, odd, torch.float32), TWIN.project(x, odd, torch.float32))
    assert torch.equal(ops.gated(x, odd, proj).float(), TWIN.gated(x, odd, proj).float())
    assert not called.calls
    odd_ops, _ = joined(ffn=24)
    assert not isinstance(odd_ops.route(torch.randn(12, HIDDEN), torch.randn(EXPERTS, HIDDEN), 2, range(EXPERTS)), SortedRouted)


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=40), st.integers(1, 3))
def test_slots_lie_by_expert_in_their_own_order(experts: list[int], top_k: int) -> None:
    order = TwinBetween().sort(torch.tensor(experts, dtype=torch.int32), top_k, 5)
    rows = order.row_S.tolist()
    assert sorted(rows) == list(range(len(experts)))
    slots = sorted(range(len(experts)), key=lambda slot: rows[slot])
    assert slots == sorted(range(len(experts)), key=lambda slot: (experts[slot] if experts[slot] >= 0 else 5, slot))
    assert order.token_R.tolist() == [slot // top_k for slot in slots]
    held = [experts[slot] for slot in slots if experts[slot] >= 0]
    assert order.expert_R.tolist()[: len(held)] == held and 0 <= int(order.expert_R.min()) <= int(order.expert_R.max()) < 5
    assert order.end_E.tolist() == [sum(expert <= last for expert in held) for last in range(5)]


@pytest.mark.parametrize(("shape", "name"), [("unlike", "fp8"), ("tiny", "bf16")])
def test_a_network_by_the_library_is_the_same(shape: str, name: str, request: pytest.FixtureRequest) -> None:
    """As twins that round experts' products alike, and as exact ones, as far as a network in FP8 forgives such roundings."""
    model: Model = request.getfixturevalue(shape)
    exact, rounded, ours = (twin_worker(model.engine(name, **RECIPES[name]), SoloCommunicator()) for _ in range(3))
    ops, called = joined(few=TwinOps(torch.float32), ffn=model.config["intermediate_size"])
    for worker, made in ((rounded, RoundedTwin(torch.float32)), (ours, ops)):
        assert isinstance(worker.network, CudaNetwork)
        worker.network._ops = made
    for step in mixed_steps(model.prompts(30, 9, 100))[:-1]:
        wanted, close, found = (lead(worker, step) for worker in (exact, rounded, ours))
        assert (found - close).abs().mean(-1).median() <= 0.01
        assert (found - wanted).abs().mean(-1).median() <= 0.05 * wanted.std()
    assert {"mm", "_grouped_mm" if name == "bf16" else "_scaled_grouped_mm"} <= set(called.calls)


@pytest.mark.parametrize(
    ("capability", "lacking", "said"), [((9, 0), "", ""), ((8, 9), "", "grouped"), ((9, 0), "mm.dtype", "bf16")]
)
def test_what_a_library_lacks_is_told(
    capability: tuple[int, int], lacking: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="there is no Triton for this machine")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(library, "functions_of_torch", lambda: set(FUNCTIONS) - {lacking})
    with caplog.at_level(logging.WARNING):
        assert isinstance(library.make_ops(RELEASED, plan_mapping(RELEASED, tp_size=8).rank(0), torch.device("cpu")), LibraryOps)
    assert [said in record.message for record in caplog.records] == ([True] if said else [])


@pytest.mark.parametrize(
    ("asked", "capability", "early"),
    [("auto", (9, 0), True), ("auto", (10, 0), True), ("auto", (8, 9), False), ("late", (9, 0), False)],
)
def test_launches_begin_early_where_gpus_can_unless_told_otherwise(
    asked: str, capability: tuple[int, int], early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton_ops = pytest.importorskip("arctic_trt.runtime.cuda.triton_ops", reason="there is no Triton for this machine")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("ARCTIC_TRT_GPU_LAUNCHES", asked)
    ops = library.make_ops(RELEASED, plan_mapping(RELEASED, tp_size=8).rank(0), torch.device("cpu"))
    assert isinstance(ops, LibraryOps) and isinstance(ops._few, triton_ops.TritonOps) and ops._few._early is early


def test_other_launches_are_refused() -> None:
    with pytest.raises(UsageError, match="ARCTIC_TRT_GPU_LAUNCHES=never is none of auto, late"):
        library.plan_early("never", (9, 0), "3.5.0")


@pytest.mark.parametrize(("version", "early"), [("3.4.1", False), ("3.5.0", True), ("3.10.0+git1a2b", True), ("4.0", True)])
def test_an_older_triton_launches_late(version: str, early: bool) -> None:
    assert library.plan_early("auto", (9, 0), version) is early
