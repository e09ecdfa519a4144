"""Products with weights: dense or of chosen experts, alone or gated and rounded for the next projection.

A program multiplies a block of rows with a block of the weight's rows over the whole length. Dense rows are the input's; rows of
experts are slots, sorted so that a block has one expert, or one slot a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import silu, store_activation

NONE = tl.constexpr(0)
FIRST_HALF = tl.constexpr(1)
SECOND_HALF = tl.constexpr(2)


@triton.jit
def project_kernel(
    x_ptr, w_ptr, alpha_ptr, y_ptr, out_scale_ptr, slot_ptr, expert_ptr, share_ptr, rows, columns, length,
    TOP_K: tl.constexpr, SORTED: tl.constexpr, GATED: tl.constexpr, HAS_ALPHA: tl.constexpr, HAS_SHARE: tl.constexpr,
    FP8_OUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``TOP_K`` slots read one row of x; 0 is for a dense product. ``GATED`` says which half goes through SiLU."""
    block = tl.program_id(1)
    lane = tl.arange(0, BLOCK_M)
    row, source = find_rows(block, lane, slot_ptr, rows, TOP_K, SORTED)
    weight_base, alpha_at = w_ptr, alpha_ptr
    if TOP_K > 0:
        expert = tl.load(expert_ptr + block)
        if expert < 0:
            return
        rows_of_weight = columns * 2 if GATED != NONE else columns
        weight_base += expert.to(tl.int64) * rows_of_weight * length
        alpha_at += expert
    valid = row < rows
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    x_at = x_ptr + source.to(tl.int64)[:, None] * length
    for begin in range(0, length, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x = tl.load(x_at + k[None, :], mask=valid[:, None] & (k[None, :] < length), other=0.0)
        w_mask = (n[:, None] < columns) & (k[None, :] < length)
        w_at = weight_base + n.to(tl.int64)[:, None] * length + k[None, :]
        first = _add_product(x, tl.load(w_at, mask=w_mask, other=0.0), first)
        if GATED != NONE:
            second = _add_product(x, tl.load(w_at + columns.to(tl.int64) * length, mask=w_mask, other=0.0), second)
    if HAS_ALPHA:
        alpha = tl.load(alpha_at)
        first, second = first * alpha, second * alpha
    if GATED == FIRST_HALF:
        first = silu(first) * second
    elif GATED == SECOND_HALF:
        first = silu(second) * first
    if HAS_SHARE:
        first *= tl.load(share_ptr + row, mask=valid, other=0.0)[:, None]
    y_at = y_ptr + row.to(tl.int64)[:, None] * columns + n[None, :]
    store_activation(y_at, first, out_scale_ptr, valid[:, None] & (n[None, :] < columns), FP8_OUT)


@triton.jit
def find_rows(block, lane, slot_ptr, rows, TOP_K: tl.constexpr, SORTED: tl.constexpr):
    """Rows of a result that are in a block, ``rows`` or more for none, and the rows of x that they are made of."""
    if TOP_K == 0:
        row = block * lane.shape[0] + lane
        source = row
    else:
        if SORTED:
            row = tl.load(slot_ptr + block * lane.shape[0] + lane)
        else:
            row = tl.where(lane == 0, block, rows)
        source = row // TOP_K
    return row, source


@triton.jit
def _add_product(x, w, total):
    """Products of e4m3 or bf16 on the tensor cores, of float32 exactly; partial sums of e4m3 go to float32 every block."""
    return tl.dot(x, tl.trans(w), total, input_precision="ieee", max_num_imprecise_acc=128)
