"""Arithmetic of the CPU against the same written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model.layer import route
from arctic_trt.runtime.kernels import CpuKernels, Projection, decode_e4m3, rounded

KERNELS = CpuKernels()
EVERY_CODE = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projection(*shape: int, seed: int = 0) -> Projection:
    alpha = torch.rand((shape[0], 1) if len(shape) == 3 else (1,), generator=torch.Generator().manual_seed(seed))
    return Projection(KERNELS.hold(random(*shape, seed=seed).to(torch.float8_e4m3fn)), torch.tensor([0.01]), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_decoded_exactly(dtype: torch.dtype) -> None:
    decoded = decode_e4m3(EVERY_CODE.view(16, 16), dtype)
    assert decoded.shape == (16, 16) and decoded.dtype == dtype
    torch.testing.assert_close(decoded.view(-1), EVERY_CODE.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_decoding_is_not_changed_by_flushing_denormals() -> None:
    expected = decode_e4m3(EVERY_CODE, torch.float32)
    torch.set_flush_denormal(True)
    try:
        torch.testing.assert_close(decode_e4m3(EVERY_CODE, torch.float32), expected, rtol=0, atol=0, equal_nan=True)
    finally:
        torch.set_flush_denormal(False)


def test_inputs_are_divided_rounded_and_saturated() -> None:
    scale = torch.tensor([0.5])
    x = torch.tensor([0.0, 0.26, -3.3, 1000.0, -1000.0])
    assert rounded(x, scale).tolist() == [0.0, 0.5, -6.5, 448.0, -448.0]
    assert rounded(x, None) is x


def test_linear_rounds_its_input_and_applies_alpha() -> None:
    x, fc = random(5, 32), projection(12, 32)
    expected = rounded(x, fc.input_scale) @ fc.weight.float().T * fc.alpha
    torch.testing.assert_close(KERNELS.linear(x, fc), expected)
    plain = Projection(random(12, 32).bfloat16())
    torch.testing.assert_close(KERNELS.linear(x, plain), x @ plain.weight.float().T)


def test_partial_sums_add_up_to_the_same_bits_however_they_are_divided() -> None:
    x, whole = random(5, 64), projection(12, 64)
    expected = KERNELS.linear(x, whole)
    for parts in (2, 4, 8):
        columns = zip(x.chunk(parts, 1), whole.weight.chunk(parts, 1), strict=True)
        total = sum(KERNELS.partial_sum(part, Projection(weight, whole.input_scale, whole.alpha)) for part, weight in columns)
        assert isinstance(total, Tensor) and total.float().equal(expected)


def test_the_first_half_of_a_gated_mlp_is_activated() -> None:
    x, fc, proj = random(5, 32), projection(24, 32), projection(16, 12, seed=1)
    inner = KERNELS.linear(x, fc)
    expected = KERNELS.linear(F.silu(inner[:, :12]) * inner[:, 12:], proj)
    torch.testing.assert_close(KERNELS.gated_mlp(x, fc, proj).float(), expected)


def of_expert(stack: Projection, expert: int) -> Projection:
    assert stack.alpha is not None
    return Projection(stack.weight[expert], stack.input_scale, stack.alpha[expert])


@pytest.mark.parametrize("first", [0, 2, 4])
def test_experts_add_up_those_that_are_held(first: int) -> None:
    """The second half of an expert's rows is activated, unlike the residual MLP's."""
    x, fc, proj = random(7, 32), projection(4, 24, 32), projection(4, 32, 12, seed=1)
    before, routing = x.clone(), route(x, random(8, 32, seed=2), 2)
    expected = torch.zeros(7, 32)
    for token in range(7):
        for expert, share in zip(routing.chosen_TK[token].tolist(), routing.share_TK[token], strict=True):
            if first <= expert < first + 4:
                inner = KERNELS.linear(x[token : token + 1], of_expert(fc, expert - first))
                out = KERNELS.linear(inner[:, :12] * F.silu(inner[:, 12:]), of_expert(proj, expert - first))
                expected[token] += share * out[0]
    torch.testing.assert_close(KERNELS.experts(x, routing, fc, proj, first).float(), expected)
    assert x.equal(before)


@pytest.mark.parametrize(("tokens", "start"), [(1, 0), (6, 0), (1, 9), (5, 4)])
def test_attention_is_causal_over_the_cache(tokens: int, start: int) -> None:
    heads, kv_heads, size, length = 6, 2, 8, tokens + start
    q, keys, values = random(tokens, heads, size), random(kv_heads, length, size, seed=1), random(kv_heads, length, size, seed=2)
    expected = torch.empty(tokens, heads, size)
    for token in range(tokens):
        seen = start + token + 1
        for head in range(heads):
            shared = head // 3
            scores = keys[shared, :seen] @ q[token, head] / size**0.5
            expected[token, head] = scores.softmax(0) @ values[shared, :seen]
    torch.testing.assert_close(KERNELS.attention(q, keys, values, start), expected.view(tokens, -1))


def test_the_cache_format_rounds_once() -> None:
    x, scale = random(2, 3, 8), torch.tensor([0.25])
    once = KERNELS.decode_kv(KERNELS.encode_kv(x, scale), scale)
    assert not once.equal(x)
    torch.testing.assert_close(KERNELS.decode_kv(KERNELS.encode_kv(once, scale), scale), once, rtol=0, atol=0)
