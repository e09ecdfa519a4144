"""What lies between products that a library computes: slots by expert, rows in that order, gates, sums."""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import silu, store_activation
from arctic_trt.runtime.cuda.kernels.route import choose


@triton.jit
def choose_kernel(
    logits_ptr, expert_ptr, share_ptr, tokens, num_experts, first_held, held, TOP_K: tl.constexpr, BM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Experts of a block of tokens, of logits that are whole."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    choose(logits_ptr, expert_ptr, share_ptr, m, tokens, num_experts, first_held, held, TOP_K, 1, BLOCK_E)


@triton.jit
def count_kernel(expert_ptr, count_ptr, slots, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """How often each expert is among a block of slots."""
    block = tl.program_id(0)
    slot, e = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    expert = tl.load(expert_ptr + slot, mask=slot < slots, other=-1)
    tl.store(count_ptr + block * EXPERTS + e, tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0))


@triton.jit
def place_kernel(
    expert_ptr, count_ptr, token_ptr, of_ptr, row_ptr, end_ptr, slots, num_experts, blocks, TOP_K: tl.constexpr,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The rows of a block of slots: after those of smaller experts, of earlier blocks, and of earlier slots of the block."""
    block = tl.program_id(0)
    e, lane, part = tl.arange(0, EXPERTS), tl.arange(0, BLOCK), tl.arange(0, PART)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, blocks, PART):
        at = begin + part[:, None]
        count = tl.load(count_ptr + at * EXPERTS + e[None, :], mask=at < blocks, other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(at < block, count, 0), 0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(end_ptr + e, end, mask=e < num_experts)
    slot = block * BLOCK + lane
    expert = tl.load(expert_ptr + slot, mask=slot < slots, other=-1)
    earlier = tl.sum(((expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])).to(tl.int32), 1)
    first = tl.sum(tl.where(expert[:, None] == e[None, :], (end - total + before)[None, :], 0), 1)
    nowhere = tl.sum(total, 0) + block * BLOCK - tl.sum(before, 0)
    row = earlier + tl.where(expert < 0, nowhere, first)
    tl.store(row_ptr + slot, row, mask=slot < slots)
    tl.store(token_ptr + row, slot // TOP_K, mask=slot < slots)
    tl.store(of_ptr + row, tl.where(expert < 0, num_experts - 1, expert), mask=slot < slots)


@triton.jit
def gather_kernel(x_ptr, token_ptr, held_ptr, y_ptr, length, BLOCK: tl.constexpr):
    """One row, byte by byte."""
    row = tl.program_id(0)
    if row >= tl.load(held_ptr):
        return
    at = tl.arange(0, BLOCK)
    source = tl.load(token_ptr + row).to(tl.int64) * length
    x = tl.load(x_ptr + source + at, mask=at < length, other=0)
    tl.store(y_ptr + row.to(tl.int64) * length + at, x, mask=at < length)


@triton.jit
def gate_kernel(
    product_ptr, out_scale_ptr, y_ptr, held_ptr, columns, EXPERTS: tl.constexpr, FP8_OUT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A part of one row; the second half of ``EXPERTS`` goes through SiLU, the first half of what is dense."""
    row = tl.program_id(0)
    held = tl.load(held_ptr) if EXPERTS else tl.num_programs(0)
    if row >= held:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    at = product_ptr + row.to(tl.int64) * columns * 2 + column
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
    gated = silu(second) * first if EXPERTS else silu(first) * second
    store_activation(y_ptr + row.to(tl.int64) * columns + column, gated, out_scale_ptr, mask, FP8_OUT)


@triton.jit
def add_kernel(
    y_ptr, rows_ptr, expert_ptr, share_ptr, row_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A part of one token: what is there, and its slots that are held, each times its share."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    at = token.to(tl.int64) * hidden + column
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        if tl.load(expert_ptr + slot) >= 0:
            row = tl.load(row_ptr + slot).to(tl.int64) * hidden
            x = tl.load(rows_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
            total += x * tl.load(share_ptr + slot)
    total += tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)
