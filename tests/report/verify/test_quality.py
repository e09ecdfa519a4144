"""Signal to noise of single matrices."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.quantize.fp8 import amax, cast_e4m3, dequantize, scale_from_amax
from arctic_trt.report.verify.quality import BLOCK_ELEMENTS, SAMPLED_BLOCKS, Cast, qualities_of, sqnr


def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scale_from_amax(amax(x)).reshape(1)
    return cast_e4m3(x, scale), scale


def test_a_sixteenth_tells_what_the_whole_would() -> None:
    x = torch.randn(SAMPLED_BLOCKS * BLOCK_ELEMENTS * 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = cast(x)
    noise = (dequantize(codes, scale) - x.float()).square().sum()
    exact = 10 * float((x.float().square().sum() / noise).log10())
    estimate = sqnr(x.view(-1, 64), codes.view(-1, 64), scale)
    assert estimate != exact and estimate == pytest.approx(exact, abs=0.1)


def test_what_loses_nothing_has_no_ratio() -> None:
    for x in (torch.zeros(8), torch.tensor([448.0, 1.0, -2.0])):
        assert sqnr(x.bfloat16(), *cast(x.bfloat16())) is None


def test_what_stays_in_bf16_is_left_out() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, scale = cast(x)
    names = ("model.layers.3.self_attn.v_proj.weight", "model.layers.3.self_attn.o_proj.weight")
    casts = [Cast(names[0], x, codes), Cast(names[1], x, x)]
    [quality] = qualities_of(casts, {"attention.qkv.weights_scaling_factor": scale})
    assert quality.tensor == names[0] and 25 < quality.sqnr_db < 40
