"""Products of few rows with weights, for which reading the weights is everything.

A program has few rows of the weight, and each of its warps two parts of every block of the length, whose sums are added at the
end in the same order always. Weights are the first operand of the tensor cores' product, so that eight tokens fill the second.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import prefetch, silu, store_activation, wait_for_inputs
from arctic_trt.runtime.cuda.kernels.project import FIRST_HALF, NONE, find_rows


@triton.jit
def skinny_kernel(
    x_ptr, w_ptr, alpha_ptr, y_ptr, out_scale_ptr, slot_ptr, expert_ptr, share_ptr, added_ptr, rows, columns, length,
    TOP_K: tl.constexpr, SORTED: tl.constexpr, GATED: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SHARE: tl.constexpr,
    ADDED: tl.constexpr, FP8_OUT: tl.constexpr, EARLY: tl.constexpr, PREFETCHED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """As :func:`project_kernel`; ``ADDED`` slots of each row, if held by ``expert_ptr``, are added to a dense product."""
    block = tl.program_id(1)
    lane, at = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    HALVES: tl.constexpr = 1 if GATED == NONE else 2
    n = tl.program_id(0) * (BLOCK_N // HALVES) + at // HALVES
    weight_row = n + at % HALVES * columns  # a column's two halves are neighbours in the tile
    if PREFETCHED:
        _prefetch_rows(w_ptr, tl.program_id(0) * (BLOCK_N // HALVES), BLOCK_N // HALVES, columns, length, HALVES)
    wait_for_inputs(EARLY)
    row, source = find_rows(block, lane, slot_ptr, rows, TOP_K, SORTED)
    weight_base, alpha_at = w_ptr, alpha_ptr
    if TOP_K > 0:
        expert = tl.load(expert_ptr + block)
        if expert < 0:
            return
        weight_base += expert.to(tl.int64) * HALVES * columns * length
        alpha_at += expert
    valid = row < rows
    x_at = x_ptr + source.to(tl.int64)[None, :, None] * length
    w_at = weight_base + weight_row.to(tl.int64)[None, :, None] * length
    total = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for begin in range(0, length, PARTS * BLOCK_K):
        k = begin + tl.arange(0, PARTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        x = tl.load(x_at + k, mask=valid[None, :, None] & (k < length), other=0.0)
        w = tl.load(w_at + k, mask=(n < columns)[None, :, None] & (k < length), other=0.0)
        total = tl.dot(w, tl.permute(x, (0, 2, 1)), total)
    y = tl.sum(total, 0)
    if HAS_ALPHA:
        y *= tl.load(alpha_at)
    if GATED != NONE:
        first, second = tl.split(tl.permute(tl.reshape(y, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1)))
        y = silu(first) * second if GATED == FIRST_HALF else silu(second) * first
        n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    if HAS_SHARE:
        y *= tl.load(share_ptr + row, mask=valid, other=0.0)[None, :]
    mask = valid[None, :] & (n < columns)[:, None]
    if ADDED > 0:
        y += _held_slots(added_ptr, expert_ptr, row, valid, n, columns, mask, ADDED)
    store_activation(y_ptr + row.to(tl.int64)[None, :] * columns + n[:, None], y, out_scale_ptr, mask, FP8_OUT)


@triton.jit
def _prefetch_rows(w_ptr, first, count: tl.constexpr, columns, length, HALVES: tl.constexpr):
    """``count`` rows of the weight from ``first`` on, of each half."""
    size = tl.minimum(count, columns - first) * length * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    for half in tl.static_range(HALVES):
        prefetch(w_ptr + (first + half * columns).to(tl.int64) * length, size)


@triton.jit
def _held_slots(slots_ptr, expert_ptr, row, valid, n, columns, mask, COUNT: tl.constexpr):
    """The sum of each row's ``COUNT`` slots that are held here, [columns, rows]."""
    total = tl.zeros((n.shape[0], row.shape[0]), tl.float32)
    for k in tl.static_range(COUNT):
        slot = row * COUNT + k
        held = tl.load(expert_ptr + slot, mask=valid, other=-1) >= 0
        slot_at = slots_ptr + slot.to(tl.int64)[None, :] * columns + n[:, None]
        total += tl.load(slot_at, mask=mask & held[None, :], other=0.0)
    return total
