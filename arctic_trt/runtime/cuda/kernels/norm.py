"""Residual sum, RMS norm and rounding in one pass over a row; and the sum of a token's experts."""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import store_activation, wait_for_inputs


@triton.jit
def norm_kernel(
    x_ptr, partial_ptr, sum_ptr, weight_0, scale_0, out_0, weight_1, scale_1, out_1, weight_2, scale_2, out_2,
    hidden, eps, ADD: tl.constexpr, OUTPUTS: tl.constexpr, FP8_0: tl.constexpr, FP8_1: tl.constexpr,
    FP8_2: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: ``sum = x + partial``, then up to three normed copies of it."""
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    mask = column < hidden
    by_0 = tl.load(weight_0 + column, mask=mask, other=0.0)
    by_1 = tl.load(weight_1 + column, mask=mask, other=0.0)
    by_2 = tl.load(weight_2 + column, mask=mask, other=0.0)
    wait_for_inputs(EARLY)
    x = tl.load(x_ptr + row + column, mask=mask, other=0.0)
    if ADD:
        x += tl.load(partial_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(sum_ptr + row + column, x, mask=mask)
    mean = tl.sum(x * x, 0) / hidden
    x = x * tl.math.div_rn(1.0, tl.sqrt_rn(mean + eps))
    store_activation(out_0 + row + column, x * by_0, scale_0, mask, FP8_0)
    if OUTPUTS > 1:
        store_activation(out_1 + row + column, x * by_1, scale_1, mask, FP8_1)
    if OUTPUTS > 2:
        store_activation(out_2 + row + column, x * by_2, scale_2, mask, FP8_2)


@triton.jit
def combine_kernel(y_ptr, slots_ptr, expert_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """A part of one row: what is there, and the token's slots that are held here."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    row = token.to(tl.int64) * hidden + column
    y = tl.load(y_ptr + row, mask=mask, other=0.0).to(tl.float32)
    slots = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        if tl.load(expert_ptr + slot) >= 0:
            slots += tl.load(slots_ptr + slot.to(tl.int64) * hidden + column, mask=mask, other=0.0)
    tl.store(out_ptr + row, (y + slots).to(out_ptr.dtype.element_ty), mask=mask)
