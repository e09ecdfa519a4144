"""E4m3 numerics, held to one-line formulas over every bf16 number there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.quantize import fp8
from arctic_trt.quantize.fp8 import E4M3_MAX, amax, cast_e4m3, dequantize, scale_from_amax

EVERY_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE_BF16 = EVERY_BF16[EVERY_BF16.isfinite()]
POSITIVE_BF16 = FINITE_BF16[FINITE_BF16 > 0]


def codes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def in_range(scale: Tensor) -> Tensor:
    """Every finite bf16 number that the scale brings into e4m3's range."""
    return FINITE_BF16[(FINITE_BF16.float() / scale).abs() <= E4M3_MAX]


@given(st.floats(2.0**-60, 2.0**60, width=32))
@example(1.0)
@example(0.0029296875)
@example(float(torch.tensor(3.0) / 448))
def test_the_cast_is_a_true_division_and_one_rounding(value: float) -> None:
    scale = torch.tensor([value])
    x = in_range(scale)
    assert len(x) > 10_000
    assert codes(cast_e4m3(x, scale)).equal(codes((x.float() / scale).to(torch.float8_e4m3fn)))


def test_no_other_way_of_dividing_gives_these_codes() -> None:
    """The variants are the tempting ones; each differs somewhere, so equality above means something."""
    scales = scale_from_amax(POSITIVE_BF16[(POSITIVE_BF16 > 0.01) & (POSITIVE_BF16 < 10)][::7])
    differing = dict.fromkeys(("reciprocal", "448 / amax", "division in bf16", "rounded through bf16"), 0)
    for scale in scales:
        x = in_range(scale)
        found = codes(cast_e4m3(x, scale))
        variants = {
            "reciprocal": x.float() * (1 / scale),
            "448 / amax": x.float() * (E4M3_MAX / (scale * E4M3_MAX)),
            "division in bf16": x / scale.bfloat16(),
            "rounded through bf16": (x.float() / scale).bfloat16(),
        }
        for name, variant in variants.items():
            differing[name] += int((codes(variant.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)) != found).sum())
    assert min(differing.values()) > 0, differing


@pytest.mark.parametrize("scale", [1.0, 1e-30, 0.37])
def test_the_cast_saturates(scale: float) -> None:
    x = FINITE_BF16[(FINITE_BF16.float() / scale).abs() > E4M3_MAX]
    found = cast_e4m3(x, torch.tensor(scale)).float()
    assert found.equal(x.float().sign() * E4M3_MAX)
    assert cast_e4m3(torch.tensor([math.inf, -math.inf, 465.0, 1e9]), torch.tensor(1.0)).float().tolist() == [448, -448, 448, 448]


def test_ties_go_to_even_and_zero_keeps_its_sign() -> None:
    x = torch.tensor([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, -0.0])
    assert cast_e4m3(x, torch.tensor(1.0)).float().tolist() == [16.0, 20.0, 0.0, 2 * 2.0**-9, 0.0]
    assert codes(cast_e4m3(x, torch.tensor(1.0)))[-1] == 0x80


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (4, 6), (3, 5, 2)])
def test_chunk_borders_leave_no_mark(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "CHUNK_ELEMENTS", 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = scale_from_amax(amax(x))
    found = cast_e4m3(x, scale)
    assert found.shape == x.shape and codes(found).equal(codes((x.float() / scale).to(torch.float8_e4m3fn)))


def test_a_matrix_that_is_not_contiguous_is_cast_like_its_copy() -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16().T
    assert codes(cast_e4m3(x, torch.tensor(0.01))).equal(codes(cast_e4m3(x.contiguous(), torch.tensor(0.01))))


def test_a_float32_source_is_left_as_it_is() -> None:
    x = torch.tensor([1.0, 1000.0, -3.0])
    assert cast_e4m3(x, torch.tensor(2.0)).float().tolist() == [0.5, 448.0, -1.5]
    assert x.tolist() == [1.0, 1000.0, -3.0]


def test_scales_are_float32_true_quotients() -> None:
    found = scale_from_amax(POSITIVE_BF16)
    exact = POSITIVE_BF16.double() / 448  # a bf16 over 448 in float64, then one rounding to float32
    assert found.dtype == torch.float32 and found.equal(exact.float())
    assert not found.equal(POSITIVE_BF16.float() * torch.tensor(1 / 448)), "multiplying by 1/448 must be distinguishable"


@pytest.mark.parametrize("value", [torch.tensor(0.0).bfloat16(), torch.tensor(-0.0), torch.zeros(3, 1)])
def test_an_amax_of_zero_gives_one(value: Tensor) -> None:
    assert scale_from_amax(value).equal(torch.ones(value.shape))


def test_a_scale_never_brings_its_amax_out_of_range() -> None:
    """The largest weight becomes 448 exactly, for every bf16 amax whose scale is a normal float32."""
    large = POSITIVE_BF16[POSITIVE_BF16 > 2.0**-110]
    scaled = large.float() / scale_from_amax(large)
    assert (scaled - E4M3_MAX).abs().max() <= 2**-15
    assert scaled.to(torch.float8_e4m3fn).float().equal(torch.full_like(scaled, E4M3_MAX))


@given(st.lists(st.integers(0, len(FINITE_BF16) - 1), min_size=1, max_size=30))
def test_amax_is_exact(picks: list[int]) -> None:
    x = FINITE_BF16[picks]
    found = amax(x)
    assert found.dtype == torch.bfloat16 and found.shape == () and float(found) == max(abs(value) for value in x.tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_amax_lets_nan_and_infinity_through(bad: float) -> None:
    for place in (0, 500, 999):
        x = torch.ones(1000).bfloat16()
        x[place] = bad
        assert not amax(x).isfinite()


def test_dequantizing_is_within_half_a_step() -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = scale_from_amax(amax(x))
    scaled = (x.float() / scale).abs()
    half_step = 2.0 ** (scaled.clamp_min(2.0**-6).log2().floor() - 4) * scale
    assert ((dequantize(cast_e4m3(x, scale), scale) - x.float()).abs() <= half_step * (1 + 2**-17)).all()
