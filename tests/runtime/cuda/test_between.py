"""Kernels between the library's products against their twins; test_compile.py has them compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="there is no Triton for this machine")

from arctic_trt.runtime.cuda.between import Order, TwinBetween
from arctic_trt.runtime.cuda.triton_between import SORT_BLOCK, TritonBetween
from arctic_trt.runtime.kernels import Projection
from tests.support.triton_interpreter import use_exact_arithmetic

if DEVICE == "cpu":
    use_exact_arithmetic()

TWIN, OURS = TwinBetween(), TritonBetween()
READERS = {"fp8": Projection(torch.empty(0), torch.full((1,), 0.01, device=DEVICE)), "bf16": Projection(torch.empty(0))}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def some_slots(slots: int, held: int = 6) -> Tensor:
    """Some of them not held, and one expert without any."""
    expert_S = torch.randint(-1, held, (slots,), dtype=torch.int32, device=DEVICE)
    return torch.where(expert_S == 3, -1, expert_S)


@pytest.mark.parametrize("slots", [2, SORT_BLOCK, 3 * SORT_BLOCK + 6, 18 * SORT_BLOCK])
def test_sort(slots: int) -> None:
    expert_S = some_slots(slots)
    found, wanted = (between.sort(expert_S, 2, 6) for between in (OURS, TWIN))
    for name in Order.__slots__:
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("expert", [-1, 0, 5])
def test_sort_where_all_are_alike(expert: int) -> None:
    order = OURS.sort(torch.full((70,), expert, dtype=torch.int32, device=DEVICE), 2, 6)
    assert order.row_S.tolist() == list(range(70))
    assert order.end_E.tolist() == [70 * (0 <= expert <= last) for last in range(6)]


@pytest.mark.parametrize("experts", [range(0, 12), range(4, 8)])
def test_choose(experts: range) -> None:
    logits_TE = torch.randn(5, 12, device=DEVICE)
    found, wanted = (between.choose(logits_TE, 2, experts) for between in (OURS, TWIN))
    assert torch.equal(found[0], wanted[0]) and found[0].dtype == wanted[0].dtype
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_gather(dtype: torch.dtype) -> None:
    order = TWIN.sort(some_slots(14), 2, 6)
    x, held = torch.randn(7, 48, device=DEVICE).to(dtype), int(order.end_E[-1])
    assert 0 < held < 14
    found, wanted = (between.gather(x, order) for between in (OURS, TWIN))
    assert found.dtype == dtype and torch.equal(found[:held].float(), wanted[:held].float())


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sorted_rows", [True, False])
def test_gate(sorted_rows: bool, dtype: torch.dtype, name: str) -> None:
    order = TWIN.sort(some_slots(8), 2, 6) if sorted_rows else None
    rows = 8 if order is None else int(order.end_E[-1])
    product = torch.randn(8, 2 * 1040, device=DEVICE).to(dtype)
    found, wanted = (between.gate(product, READERS[name], order)[:rows].float() for between in (OURS, TWIN))
    apart = found != wanted
    assert apart.float().mean() <= 0.002, "an exponential that is one bit off may round to the next code"
    torch.testing.assert_close(found, wanted, rtol=0.13, atol=0.002)
    assert OURS.gate(product, READERS[name], order).dtype == TWIN.gate(product, READERS[name], order).dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add(dtype: torch.dtype) -> None:
    expert_S, share_S = some_slots(14), torch.rand(14, device=DEVICE)
    order = TWIN.sort(expert_S, 2, 6)
    rows_SD, y_TD = torch.randn(14, 1040, device=DEVICE).bfloat16(), torch.randn(7, 1040, device=DEVICE).to(dtype)
    rows_SD[int(order.end_E[-1]) :] = torch.nan  # nobody computed them
    found, wanted = (between.add(y_TD, rows_SD, expert_S, share_S, order) for between in (OURS, TWIN))
    torch.testing.assert_close(found, wanted, rtol=8e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
