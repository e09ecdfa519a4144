"""Products by torch's library: the calls are what its operators take, for every shape of full-size Arctic and on every GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from arctic_trt.runtime.cuda.products import FUNCTIONS, Abilities, TorchProducts, functions_of_torch, plan_abilities
from tests.support.torch_library import TorchLibrary

HIDDEN, EXPERTS, TOKENS = 7168, 128, 2048
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
SCHEMAS = {
    "_scaled_mm": "(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? bias=None, Tensor? scale_result=None, "
    "ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor",
    "_scaled_grouped_mm": "(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, Tensor? offs=None, Tensor? bias=None, "
    "Tensor? scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False) -> Tensor",
    "_grouped_mm": "(Tensor self, Tensor mat2, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_operators_have_the_signatures_that_were_read(name: str) -> None:
    assert str(getattr(torch.ops.aten, name).default._schema) == f"aten::{name}{SCHEMAS[name]}"


def test_this_torch_has_them_all() -> None:
    assert functions_of_torch() == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("capability", "lacking", "wanted"),
    [
        ((9, 0), "", Abilities(fp8=True, bf16=True, grouped=True)),
        ((8, 9), "", Abilities(fp8=True, bf16=True, grouped=False)),
        ((10, 0), "", Abilities(fp8=True, bf16=True, grouped=False)),
        ((8, 0), "", Abilities(fp8=False, bf16=True, grouped=False)),
        ((9, 0), "_scaled_grouped_mm", Abilities(fp8=True, bf16=True, grouped=False)),
        ((9, 0), "mm.dtype", Abilities(fp8=True, bf16=False, grouped=True)),
        ((9, 0), "_scaled_mm", Abilities(fp8=False, bf16=True, grouped=True)),
    ],
)
def test_abilities_follow_the_gpu_and_the_version(capability: tuple[int, int], lacking: str, wanted: Abilities) -> None:
    assert plan_abilities(capability, set(FUNCTIONS) - {lacking}) == wanted


@pytest.mark.parametrize("weight", [(1152, HIDDEN), (HIDDEN, 896), (1792, HIDDEN)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_dense_layers_of_arctic_are_taken(weight: tuple[int, int], dtype: torch.dtype) -> None:
    y = PRODUCTS.dense(meta(E4M3, TOKENS, weight[1]), meta(E4M3, *weight), meta(torch.float32, 1), dtype)
    assert y.shape == (TOKENS, weight[0]) and y.dtype == dtype and y.is_contiguous()


@pytest.mark.parametrize("weight", [(EXPERTS, 1216, HIDDEN), (EXPERTS, HIDDEN, 608), (16, 9728, HIDDEN), (16, HIDDEN, 4864)])
@pytest.mark.parametrize("dtype", [E4M3, BF16])
def test_experts_of_arctic_are_taken(weight: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Cut over eight ranks, and as an eighth of them."""
    scale = meta(torch.float32, 2 * TOKENS) if dtype == E4M3 else None
    y = PRODUCTS.grouped(meta(dtype, 2 * TOKENS, weight[2]), meta(dtype, *weight), scale, meta(torch.int32, weight[0]))
    assert y.shape == (2 * TOKENS, weight[1]) and y.dtype == BF16 and y.is_contiguous()


def test_what_is_not_aligned_is_refused_by_torch() -> None:
    with pytest.raises(RuntimeError, match="divisible by 16"):
        PRODUCTS.dense(meta(E4M3, 256, 64), meta(E4M3, 40, 64), meta(torch.float32, 1), BF16)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        PRODUCTS.grouped(meta(E4M3, 256, 72), meta(E4M3, 4, 48, 72), meta(torch.float32, 256), meta(torch.int32, 4))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_dense_products_are_right(dtype: torch.dtype) -> None:
    ours = TorchProducts(torch.device("cpu"), TorchLibrary())
    x, w = torch.randn(5, 48), torch.randn(32, 48)
    found = ours.dense(x.to(E4M3), w.to(E4M3), torch.tensor([0.5]), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), x.to(E4M3).float() @ w.to(E4M3).float().t() * 0.5, rtol=8e-3, atol=1e-5)
    found = ours.dense(x.bfloat16(), w.bfloat16(), None, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), x.bfloat16().float() @ w.bfloat16().float().t(), rtol=8e-3, atol=1e-5)


def test_torch_on_the_cpu_agrees_where_it_has_the_product() -> None:
    x, w, alpha = torch.randn(20, 64).to(E4M3), torch.randn(48, 64).to(E4M3), torch.tensor([0.3])
    found, wanted = (
        TorchProducts(torch.device("cpu"), library).dense(x, w, alpha, torch.float32) for library in (torch, TorchLibrary())
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [E4M3, BF16])
def test_rows_go_to_their_groups(dtype: torch.dtype) -> None:
    ours = TorchProducts(torch.device("cpu"), TorchLibrary())
    x, w, scale = torch.randn(9, 48).to(dtype), torch.randn(4, 32, 48).to(dtype), torch.rand(9)
    found = ours.grouped(x, w, scale if dtype == E4M3 else None, torch.tensor([0, 4, 4, 7], dtype=torch.int32))
    for row, group in enumerate([1, 1, 1, 1, 3, 3, 3]):
        wanted = w[group].float() @ x[row].float() * (scale[row] if dtype == E4M3 else 1)
        torch.testing.assert_close(found[row].float(), wanted, rtol=8e-3, atol=1e-5)
    assert found[7:].isnan().all(), "nobody computes rows after the last group"


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


PRODUCTS = TorchProducts(torch.device("meta"), TorchLibrary())
