"""Kernels against their twins: under Triton's interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="there is no Triton for this machine")

from arctic_trt.quantize.fp8 import amax, cast_e4m3, scale_from_amax
from arctic_trt.runtime.cuda.ops import AttentionRows, NormOutput, Routed, plan_blocks
from arctic_trt.runtime.cuda.triton_ops import TritonOps
from arctic_trt.runtime.cuda.twin import TwinOps
from arctic_trt.runtime.kernels import Projection, Tables
from tests.support.triton_interpreter import use_exact_arithmetic

if DEVICE == "cpu":
    use_exact_arithmetic()

TWIN, OPS = TwinOps(), TritonOps()
EPS = 1e-5


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def projection(*shape: int, fp8: bool = True, input_scale: float = 0.01) -> Projection:
    weight = torch.randn(*shape, device=DEVICE) / shape[-1] ** 0.5
    if not fp8:
        return Projection(weight.bfloat16())
    scale = scale_from_amax(amax(weight))
    given = torch.full((1,), input_scale, device=DEVICE)
    alpha = (scale * given).reshape(1) if len(shape) == 2 else (scale * given).expand(shape[0], 1).contiguous()
    return Projection(cast_e4m3(weight, scale), given, alpha)


def codes(rows: int, length: int, reader: Projection) -> Tensor:
    x = torch.randn(rows, length, device=DEVICE)
    return x.bfloat16() if reader.input_scale is None else cast_e4m3(x, reader.input_scale)


def assert_like(found: Tensor, wanted: Tensor, *, codes_apart: float = 0.01, rtol: float = 1e-5) -> None:
    """Equal up to float32 sums; codes may, now and then, be neighbours."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if found.dtype == torch.float8_e4m3fn:
        apart = found.float() != wanted.float()
        assert apart.float().mean() <= codes_apart
        torch.testing.assert_close(found.float(), wanted.float(), rtol=0.13, atol=0.002)
    else:
        tolerance = 8e-3 if found.dtype == torch.bfloat16 else rtol
        torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("add", [False, True])
def test_norm(tokens: int, add: bool) -> None:
    x = torch.randn(tokens, 72, device=DEVICE)
    partial = torch.randn(tokens, 72, device=DEVICE).bfloat16() if add else None
    weights = [torch.rand(72, device=DEVICE) for _ in range(3)]
    outputs = [
        NormOutput(weight, reader)
        for weight, reader in zip(weights, (projection(8, 72), projection(8, 72, fp8=False), None), strict=True)
    ]
    for count in (1, 2, 3):
        found, wanted = (ops.norm(x, partial, outputs[:count], EPS) for ops in (OPS, TWIN))
        for one, other in zip(found, wanted, strict=True):
            assert_like(one, other)


@pytest.mark.parametrize(("tokens", "length"), [(1, 72), (9, 72), (16, 1200), (1, 2200), (40, 72), (70, 72)])
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project(tokens: int, length: int, fp8: bool, dtype: torch.dtype) -> None:
    weight = projection(40, length, fp8=fp8)
    x = codes(tokens, length, weight)
    assert_like(OPS.project(x, weight, dtype), TWIN.project(x, weight, dtype), rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("fp8", [True, False])
def test_gated(tokens: int, fp8: bool) -> None:
    fc, proj = projection(80, 72, fp8=fp8), projection(72, 40, fp8=fp8)
    x = codes(tokens, 72, fc)
    assert_like(OPS.gated(x, fc, proj), TWIN.gated(x, fc, proj))


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("experts", [range(0, 12), range(4, 8)])
@pytest.mark.parametrize("fp8", [True, False])
def test_experts(tokens: int, experts: range, fp8: bool) -> None:
    router = torch.randn(12, 72, device=DEVICE).bfloat16()
    fc, proj = projection(len(experts), 48, 72, fp8=fp8), projection(len(experts), 72, 24, fp8=fp8)
    moe_x = torch.randn(tokens, 72, device=DEVICE)
    routed, twin_routed = (ops.route(moe_x, router, 2, experts) for ops in (OPS, TWIN))
    assert torch.equal(routed.expert_S, twin_routed.expert_S)
    assert_like(routed.share_S, twin_routed.share_S)
    x = codes(tokens, 72, fc)
    inner, twin_inner = OPS.expert_gated(x, routed, fc, proj), TWIN.expert_gated(x, twin_routed, fc, proj)
    held = routed.expert_S >= 0
    assert_like(_rows(inner, held), _rows(twin_inner, held))
    slots, twin_slots = OPS.expert_project(twin_inner, routed, proj), TWIN.expert_project(twin_inner, twin_routed, proj)
    assert_like(slots[held], twin_slots[held], rtol=1e-4)
    slots[~held] = torch.nan  # nobody promises anything about them
    y = torch.randn(tokens, 72, device=DEVICE)
    assert_like(OPS.combine(y, slots, routed), TWIN.combine(y, twin_slots, routed), rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 9, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_and_combine(tokens: int, dtype: torch.dtype) -> None:
    weight = projection(40, 72)
    expert_S = torch.randint(-1, 3, (2 * tokens,), dtype=torch.int32, device=DEVICE)
    routed, slots = Routed(expert_S, torch.rand(2 * tokens, device=DEVICE), 2), torch.randn(2 * tokens, 40, device=DEVICE)
    slots[expert_S < 0] = torch.nan
    arguments = (codes(tokens, 72, weight), weight, slots, routed, dtype)
    assert_like(OPS.project_and_combine(*arguments), TWIN.project_and_combine(*arguments), rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_route_leaves_its_counters_as_they_were(tokens: int) -> None:
    router, x = torch.randn(12, 300, device=DEVICE), torch.randn(tokens, 300, device=DEVICE)
    ops = TritonOps()
    for _ in range(2):
        routed, wanted = (each.route(x, router, 3, range(2, 9)) for each in (ops, TWIN))
        assert torch.equal(routed.expert_S, wanted.expert_S)
        assert_like(routed.share_S, wanted.share_S)
    with pytest.raises(ValueError, match="counters"):
        ops._counters("route", 1 << 20, x.device)


@pytest.mark.parametrize(("slots", "experts", "block"), [(1, 1, 16), (33, 128, 16), (77, 5, 16), (200, 3, 64), (1030, 7, 32)])
def test_blocks_are_planned_alike(slots: int, experts: int, block: int) -> None:
    expert_S = torch.randint(-1, experts, (slots,), dtype=torch.int32, device=DEVICE)
    for found, wanted in zip(OPS.plan_blocks(expert_S, experts, block), plan_blocks(expert_S, experts, block), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


@pytest.mark.parametrize("block", [1, 16])
def test_every_held_slot_has_one_place_among_its_expert(block: int) -> None:
    expert_S = torch.randint(-1, 5, (77,), dtype=torch.int32)
    slot_B, expert_R = plan_blocks(expert_S, 5, block)
    placed = slot_B[slot_B < 77]
    assert sorted(placed.tolist()) == [slot for slot in range(77) if expert_S[slot] >= 0]
    for row, slots in enumerate(slot_B.view(-1, block)):
        assert {int(expert_S[slot]) for slot in slots if slot < 77} <= {int(expert_R[row])}


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("splits", "row_tokens", "size"), [(1, 2, 16), (3, 1, 24), (1, 8, 24)])
def test_attention(fp8: bool, splits: int, row_tokens: int, size: int) -> None:
    check_attention([0, 70, 3, 0], [1, 1, 9, 20], fp8, splits, row_tokens, size)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("splits", [1, 3])
def test_attention_of_one_token_of_each_sequence(fp8: bool, splits: int) -> None:
    """Also of a recorded step with room for more sequences, whose chunk has no token."""
    check_attention([0, 70, 64, 0], [1, 1, 1, 0], fp8, splits, 1, 24)


def check_attention(starts: list[int], counts: list[int], fp8: bool, splits: int, row_tokens: int, size: int) -> None:
    heads, kv_heads, page, blocks = 6, 2, 8, 40
    pages = torch.randn(blocks, 2, kv_heads, page, size, device=DEVICE)
    scale = torch.full((1,), 0.02, device=DEVICE) if fp8 else None
    pages = pages if scale is None else cast_e4m3(pages, scale)
    pages = pages.clone()
    used, tables = torch.randperm(blocks, device=DEVICE).int(), torch.zeros(4, 10, dtype=torch.int32, device=DEVICE)
    taken = 0
    for chunk, (start, count) in enumerate(zip(starts, counts, strict=True)):
        need = -(-(start + count) // page)
        tables[chunk, :need] = used[taken : taken + need]
        taken += need
    first = [0, *torch.tensor(counts).cumsum(0).tolist()[:-1]]
    cut = [(chunk, offset) for chunk, count in enumerate(counts) for offset in range(0, max(1, count), row_tokens)]
    rows = AttentionRows(
        tables=Tables(_ints(starts), _ints(counts), tables),
        first_C=_ints(first),
        chunk_R=_ints([chunk for chunk, _ in cut]),
        offset_R=_ints([offset for _, offset in cut]),
        tokens=row_tokens,
        splits=splits,
        single=max(counts) == 1,
    )
    position = [start + place for start, count in zip(starts, counts, strict=True) for place in range(count)]
    slot = [
        int(tables[chunk, (start + place) // page]) * page + (start + place) % page
        for chunk, (start, count) in enumerate(zip(starts, counts, strict=True))
        for place in range(count)
    ]
    qkv = torch.randn(sum(counts), (heads + 2 * kv_heads) * size, device=DEVICE)
    rotary = torch.randn(80, size, device=DEVICE), torch.randn(80, size, device=DEVICE)
    rotary = tuple(torch.cat((table[:, : size // 2],) * 2, 1) for table in rotary)
    results = []
    for ops in (OPS, TWIN):
        mine = pages.clone()
        reader = projection(8, heads * size, fp8=fp8)
        results.append((mine, ops.attend(qkv, rotary, _ints(position), mine, _ints(slot), rows, scale, reader)))
    (mine, out), (twin_mine, twin_out) = results
    assert_like(mine, twin_mine)
    assert not torch.equal(mine.float(), pages.float())
    unit = 0.01 if fp8 else 1.0  # queries and weights of positions are bf16
    torch.testing.assert_close(out.float() * unit, twin_out.float() * unit, rtol=0.13 if fp8 else 0.02, atol=0.01)


def test_what_is_not_finite_stays_so() -> None:
    weight = projection(40, 72)
    for ops in (OPS, TWIN):
        x = torch.full((1, 72), torch.nan, device=DEVICE)
        (_, normed) = ops.norm(x, None, [NormOutput(torch.ones(72, device=DEVICE), weight)], EPS)
        assert ops.project(normed, weight, torch.float32).isnan().all()


def _rows(x: Tensor, held: Tensor) -> Tensor:
    return x.view(torch.uint8)[held].view(x.dtype) if x.dtype == torch.float8_e4m3fn else x[held]


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)
