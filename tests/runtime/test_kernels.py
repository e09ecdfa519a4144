"""Arithmetic of the CPU against the same written out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model.layer import route
from arctic_trt.runtime.kernels import CpuKernels, Projection, Tables, decode_e4m3, rounded

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


HEADS, KV_HEADS, SIZE, BLOCK = 6, 2, 8, 4


def written_out(q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attention of one sequence, [T, N, H] over [L, K, H], token by token and head by head."""
    out = torch.empty_like(q)
    for token, head in itertools.product(range(len(q)), range(HEADS)):
        seen, shared = slice(start + token + 1), head // (HEADS // KV_HEADS)
        scores = keys[seen, shared] @ q[token, head] / SIZE**0.5
        out[token, head] = scores.softmax(0) @ values[seen, shared]
    return out


def pages_of(dtype: torch.dtype, num_blocks: int) -> Tensor:
    """Pages whose every unwritten place would be noticed."""
    return torch.full((num_blocks, 2, KV_HEADS, BLOCK, SIZE), torch.nan).to(dtype)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.25])])
@pytest.mark.parametrize("chunks", [[(0, 1)], [(0, 6)], [(9, 1)], [(4, 5)], [(3, 1), (0, 1), (7, 4), (0, 9), (8, 1)]])
def test_attention_is_causal_over_the_pages_of_each_sequence(chunks: list[tuple[int, int]], scale: Tensor | None) -> None:
    lengths = [start + count for start, count in chunks]
    num_blocks = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(1)).int()
    blocks = order.split(num_blocks)
    pages = pages_of(torch.float32 if scale is None else torch.float8_e4m3fn, len(order))
    queries, expected = [], []
    for seed, ((start, count), mine) in enumerate(zip(chunks, blocks, strict=True)):
        q, *kv = (
            random(length, heads, SIZE, seed=7 * seed + i)
            for i, (length, heads) in enumerate([(count, HEADS), (start + count, KV_HEADS), (start + count, KV_HEADS)])
        )
        position = torch.arange(start + count)
        slots = mine.long()[position // BLOCK] * BLOCK + position % BLOCK
        for part in (slice(start), slice(start, None)):  # an earlier step, and this one
            KERNELS.store_kv(kv[0][part], kv[1][part], pages, slots[part], scale)
        queries.append(q)
        keys, values = kv if scale is None else (rounded(x, scale) * scale for x in kv)
        expected.append(written_out(q, keys, values, start))
    tables = Tables(
        start_C=torch.tensor([start for start, _ in chunks], dtype=torch.int32),
        count_C=torch.tensor([count for _, count in chunks], dtype=torch.int32),
        block_CM=torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True),
    )
    found = KERNELS.attention(torch.cat(queries), pages, tables, scale)
    assert found.dtype == torch.float32 and found.shape == (sum(count for _, count in chunks), HEADS * SIZE)
    torch.testing.assert_close(found, torch.cat(expected).flatten(1))


@pytest.mark.parametrize("scale", [None, torch.tensor([0.25])])
def test_keys_and_values_are_stored_at_their_slots_and_nowhere_else(scale: Tensor | None) -> None:
    pages = torch.zeros(3, 2, KV_HEADS, BLOCK, SIZE).to(torch.float32 if scale is None else torch.float8_e4m3fn)
    both = random(2, KV_HEADS, 5, SIZE).transpose(1, 2)  # strided, as a slice of a projection is
    slots = torch.tensor([7, 0, 11, 4, 2])
    KERNELS.store_kv(both[0], both[1], pages, slots, scale)
    expected = torch.zeros(2, 12, KV_HEADS, SIZE)
    expected[:, slots] = both if scale is None else rounded(both, scale)
    torch.testing.assert_close(pages.float().permute(1, 0, 3, 2, 4).reshape(2, 12, KV_HEADS, SIZE), expected, rtol=0, atol=0)
