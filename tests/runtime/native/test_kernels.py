"""The compiled kernels against the portable ones, which compute in float64, and against themselves in company."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arctic_trt.model.layer import Routing, rotary_tables
from arctic_trt.runtime.kernels import CpuKernels, Projection, Tables
from arctic_trt.runtime.native.kernels import NativeKernels
from arctic_trt.runtime.native.library import NATIVE, compile_library, find_compiler, open_library

PORTABLE = CpuKernels()
SIZES = [(64, 64), (37, 72), (130, 200), (5, 8), (16, 1), (3, 130), (96, 1408)]
DTYPES = [torch.float8_e4m3fn, torch.bfloat16, torch.float32]
EVERY_CODE = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


X86 = platform.machine() == "x86_64"
BUILDS = {"this processor": NATIVE, "AVX2": ("-mavx2 -mfma",), "baseline": ("-O3",)}


@pytest.fixture(scope="module", params=[(1, "this processor"), (3, "this processor"), (2, "AVX2"), (1, "baseline")], ids=str)
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeKernels:
    """Also as other processors would have it compiled."""
    threads, build = request.param
    if build == "AVX2" and not (X86 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")):
        pytest.skip("this processor has no AVX2")
    path = tmp_path_factory.mktemp("library") / "kernels.so"
    compiler = find_compiler(os.environ)
    assert compiler is not None
    compile_library(compiler, path, BUILDS[build])
    return NativeKernels(threads, open_library(path))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projection(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn, seed: int = 0) -> Projection:
    weight = random(*shape, seed=seed).to(dtype)
    if dtype != torch.float8_e4m3fn:
        return Projection(weight)
    alpha = torch.rand((shape[0], 1) if len(shape) == 3 else (1,), generator=torch.Generator().manual_seed(seed)) + 0.1
    return Projection(weight, torch.tensor([0.01]), alpha)


def held(each: Projection) -> Projection:
    return Projection(PORTABLE.hold(each.weight), each.input_scale, each.alpha)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=2e-6 * float(expected.abs().max()))


def alone(compute: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    return torch.cat([compute(x[begin : begin + size]) for begin in range(0, len(x), size)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_products(native: NativeKernels, rows: int, columns: int, dtype: torch.dtype) -> None:
    x, weights = random(40, columns), projection(rows, columns, dtype=dtype)
    found = native.linear(x, weights)
    close(found, PORTABLE.linear(x, held(weights)))
    for size in (1, 2, 3, 4, 5, 6, 7, 13):
        assert alone(lambda part: native.linear(part, weights), x, size).equal(found), f"{size} rows at a time"


def test_every_code_counts_as_what_it_is(native: NativeKernels) -> None:
    """One code a row against an input of one: subnormal codes too, which vdpbf16ps would take for zero as they stand."""
    weights = Projection(EVERY_CODE.view(256, 1), torch.tensor([1.0]), torch.tensor([1.0]))
    for rows in (1, 9):
        found = native.linear(torch.ones(rows, 1), weights)
        torch.testing.assert_close(found, EVERY_CODE.float().expand(rows, 256), rtol=0, atol=0, equal_nan=True)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=70),
    st.sampled_from([1.0, 0.37, 3e-3]),
)
@settings(max_examples=200)
def test_inputs_are_rounded_as_the_portable_kernels_round_them(values: list[float], scale: float) -> None:
    """Against the identity, with one input at a time, so that one that is not a number stays alone."""
    x, size = torch.tensor(values), len(values)
    diagonal = Projection(torch.eye(size).to(torch.float8_e4m3fn), torch.tensor([scale]), torch.tensor([1.0]))
    pages = torch.zeros(1, 2, 1, size, 1, dtype=torch.float8_e4m3fn)
    expected = pages.clone()
    for kernels, target in ((NativeKernels(1), pages), (PORTABLE, expected)):
        kernels.store_kv(x.view(-1, 1, 1), x.view(-1, 1, 1), target, torch.arange(size), torch.tensor([scale]))
    assert pages.view(torch.uint8).equal(expected.view(torch.uint8))
    finite = x.where(x.isfinite(), 0)
    found = NativeKernels(1).linear(finite[None], diagonal)
    assert found.equal(PORTABLE.linear(finite[None], held(diagonal)))


def test_saturation_ties_and_subnormals(native: NativeKernels) -> None:
    codes = EVERY_CODE.float()[:127]
    between = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([codes, between, between.nextafter(codes[1:]), between.nextafter(codes[:-1]), torch.tensor([464.0, 1e30])])
    x = torch.cat([x, -x])
    pages = torch.zeros(1, 2, 1, len(x), 1, dtype=torch.float8_e4m3fn)
    native.store_kv(x.view(-1, 1, 1), -x.view(-1, 1, 1), pages, torch.arange(len(x)), torch.tensor([1.0]))
    assert pages[0, 0, 0, :, 0].float().equal(x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert pages[0, 1, 0, :, 0].float().equal((-x).clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_what_is_not_a_number_stays_so(native: NativeKernels) -> None:
    x, fc, proj = random(3, 64), projection(96, 64), projection(64, 48, seed=1)
    x[1, 5] = torch.nan
    for found in (native.linear(x, fc), native.gated_mlp(x, fc, proj), native.rms_norm(x, torch.ones(64), 1e-5)):
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("hidden", [64, 100, 2048])
def test_norms(native: NativeKernels, hidden: int) -> None:
    x, weight = 3 * random(40, hidden), random(hidden, seed=1)
    found = native.rms_norm(x, weight, 1e-5)
    close(found, PORTABLE.rms_norm(x, weight, 1e-5))
    assert alone(lambda part: native.rms_norm(part, weight, 1e-5), x, 3).equal(found)


@pytest.mark.parametrize("size", [8, 16, 128])
def test_rotation(native: NativeKernels, size: int) -> None:
    qkv = random(9, 7, size)
    expected = qkv.clone()
    cos, sin = (table[:, None] for table in rotary_tables(torch.arange(3, 12), size, 10000.0))
    native.rotate(qkv, 5, cos, sin)
    PORTABLE.rotate(expected, 5, cos, sin)
    close(qkv, expected)
    assert qkv[:, 5:].equal(expected[:, 5:])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_routing(native: NativeKernels, top_k: int) -> None:
    x, router = random(50, 72), random(20, 72, seed=1)
    found, expected = native.route(x, router, top_k), PORTABLE.route(x, router, top_k)
    assert found.chosen_TK.equal(expected.chosen_TK)
    close(found.share_TK, expected.share_TK)


def test_equal_experts_are_still_different_ones(native: NativeKernels) -> None:
    routing = native.route(random(4, 16), torch.ones(6, 16), 3)
    assert all(len(set(row)) == 3 for row in routing.chosen_TK.tolist())
    torch.testing.assert_close(routing.share_TK, torch.full((4, 3), 1 / 3))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("ffn", [12, 48, 200])
def test_gated_mlp(native: NativeKernels, ffn: int, dtype: torch.dtype) -> None:
    x, fc, proj = random(11, 64), projection(2 * ffn, 64, dtype=dtype), projection(64, ffn, dtype=dtype, seed=1)
    found = native.gated_mlp(x, fc, proj)
    assert_nearly_all_close(found, PORTABLE.gated_mlp(x, held(fc), held(proj)))
    assert alone(lambda part: native.gated_mlp(part, fc, proj), x, 2).equal(found)


def assert_nearly_all_close(found: Tensor, expected: Tensor) -> None:
    """An inner activation that lies between two codes may round either way and move a row by one code's share."""
    wrong = (found - expected.float()).abs() > 2e-5 * expected.abs().max()
    assert wrong.any(1).float().mean() < 0.2
    torch.testing.assert_close(found, expected.float(), rtol=0.1, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("first", "count"), [(0, 8), (2, 4), (7, 1)])
def test_experts(native: NativeKernels, first: int, count: int, dtype: torch.dtype) -> None:
    x, router = random(30, 64), random(8, 64, seed=3)
    fc, proj = projection(count, 48, 64, dtype=dtype), projection(count, 64, 24, dtype=dtype, seed=1)
    routing = PORTABLE.route(x, router, 2)
    found = native.experts(x, routing, fc, proj, first)
    assert_nearly_all_close(found, PORTABLE.experts(x, routing, held(fc), held(proj), first))

    def some(rows: Tensor) -> Tensor:
        return native.experts(x[rows], Routing(routing.chosen_TK[rows], routing.share_TK[rows]), fc, proj, first)

    assert alone(some, torch.arange(30), 4).equal(found)


def test_nobody_chose_the_experts_held(native: NativeKernels) -> None:
    x, routing = random(3, 64), Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert not native.experts(x, routing, projection(2, 48, 64), projection(2, 64, 24), 5).any()


def test_more_tokens_than_are_prepared_at_a_time(native: NativeKernels) -> None:
    x, fc, proj = random(1100, 32), projection(32, 32), projection(32, 16, seed=1)
    assert native.gated_mlp(x, fc, proj)[-5:].equal(native.gated_mlp(x[-5:], fc, proj))
    experts, back, routing = projection(4, 32, 32), projection(4, 32, 16, seed=1), native.route(x, random(4, 32), 2)
    tail = Routing(routing.chosen_TK[-5:], routing.share_TK[-5:])
    assert native.experts(x, routing, experts, back, 0)[-5:].equal(native.experts(x[-5:], tail, experts, back, 0))


Cached = dict[str, Any]


def cached(lengths: list[tuple[int, int]], *, kv_heads: int, size: int, positions: int, dtype: torch.dtype) -> Cached:
    """Pages in shuffled order with the keys and values of sequences of (start, count), and the tables for them."""
    blocks = [-(-(start + count) // positions) for start, count in lengths]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[order.pop() for _ in range(number)] for number in blocks]
    widest = max(blocks)
    scale = torch.tensor([0.02]) if dtype == torch.float8_e4m3fn else None
    pages = torch.zeros(sum(blocks) + 2, 2, kv_heads, positions, size, dtype=dtype)
    for sequence, ((start, count), table) in enumerate(zip(lengths, tables, strict=True)):
        slot = torch.tensor([table[at // positions] * positions + at % positions for at in range(start + count)])
        k, v = (random(start + count, kv_heads, size, seed=2 * sequence + which) for which in (0, 1))
        PORTABLE.store_kv(k, v, pages, slot, scale)
    return {
        "pages": pages,
        "tables": Tables(
            start_C=torch.tensor([start for start, _ in lengths], dtype=torch.int32),
            count_C=torch.tensor([count for _, count in lengths], dtype=torch.int32),
            block_CM=torch.tensor([[*table, *[0] * (widest - len(table))] for table in tables], dtype=torch.int32),
        ),
        "scale": scale,
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "positions"), [(8, 2, 16, 4), (7, 1, 128, 32), (6, 3, 8, 5), (4, 4, 20, 16)]
)
def test_attention_over_pages(
    native: NativeKernels, heads: int, kv_heads: int, size: int, positions: int, dtype: torch.dtype
) -> None:
    lengths = [(0, 1), (0, 40), (9, 1), (13, 30), (70, 2)]
    room = cached(lengths, kv_heads=kv_heads, size=size, positions=positions, dtype=dtype)
    qkv = random(sum(count for _, count in lengths), heads + 2, size, seed=9)
    q = qkv[:, :heads]
    found = native.attention(q, **room)
    close(found, PORTABLE.attention(q, **room))


def test_attention_does_not_depend_on_the_chunks(native: NativeKernels) -> None:
    room = cached([(0, 50)], kv_heads=2, size=16, positions=8, dtype=torch.float8_e4m3fn)
    q = random(50, 6, 16, seed=9)
    whole = native.attention(q, **room)
    for sizes in ([1] * 50, [7] * 7 + [1], [20, 30]):
        parts, begin = [], 0
        for count in sizes:
            tables = Tables(
                torch.tensor([begin], dtype=torch.int32), torch.tensor([count], dtype=torch.int32), room["tables"].block_CM
            )
            parts.append(native.attention(q[begin : begin + count], room["pages"], tables, room["scale"]))
            begin += count
        assert torch.cat(parts).equal(whole), sizes[:2]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32])
def test_keys_and_values_go_where_they_belong(native: NativeKernels, dtype: torch.dtype) -> None:
    scale = torch.tensor([0.02]) if dtype == torch.float8_e4m3fn else None
    qkv, slot = random(7, 6, 20), torch.tensor([3, 17, 8, 0, 5, 11, 1])
    pages, expected = (torch.zeros(4, 2, 2, 5, 20, dtype=dtype) for _ in range(2))
    for kernels, target in ((native, pages), (PORTABLE, expected)):
        kernels.store_kv(qkv[:, 2:4], qkv[:, 4:], target, slot, scale)
    assert pages.view(torch.uint8).equal(expected.view(torch.uint8))
