"""Attention over a paged cache, and what is stored into it.

Keys and values are e4m3 codes, which bf16 represents exactly, or float32; their scale is taken out of the sums. A block of rows
holds all query heads of one KV head for some tokens of one chunk. Parts of a long sequence are summed by programs of their own,
and merged afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import store_activation


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr, cos_ptr, sin_ptr, position_ptr, pages_ptr, slot_ptr, scale_ptr, q_ptr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One head of one token, by the two halves that a rotation mixes."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, HALF)
    mask = lane < SIZE // 2
    at = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE + lane
    left, right = tl.load(at, mask=mask, other=0.0), tl.load(at + SIZE // 2, mask=mask, other=0.0)
    if head < HEADS + KV_HEADS:
        table = tl.load(position_ptr + token).to(tl.int64) * SIZE + lane
        cos, sin = tl.load(cos_ptr + table, mask=mask, other=0.0), tl.load(sin_ptr + table, mask=mask, other=0.0)
        left, right = left * cos - right * sin, right * cos + left * sin
    if head < HEADS:
        q_at = q_ptr + (token * HEADS + head) * SIZE + lane
        tl.store(q_at, left.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_at + SIZE // 2, right.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        is_value = head >= HEADS + KV_HEADS
        kv_head = head - HEADS - tl.where(is_value, KV_HEADS, 0)
        slot = tl.load(slot_ptr + token).to(tl.int64)
        page = (slot // PAGE * 2 + tl.where(is_value, 1, 0)) * KV_HEADS + kv_head
        page_at = pages_ptr + (page * PAGE + slot % PAGE) * SIZE + lane
        store_activation(page_at, left, scale_ptr, mask, FP8)
        store_activation(page_at + SIZE // 2, right, scale_ptr, mask, FP8)


@triton.jit
def attend_kernel(
    q_ptr, pages_ptr, scale_ptr, start_ptr, count_ptr, first_ptr, block_ptr, chunk_ptr, offset_ptr, sums_ptr,
    largest_ptr, total_ptr, tokens, width, softmax_scale, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, ROW_TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, a part of the positions: unnormalised sums, the largest score, the sum of weights."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    chunk, offset = tl.load(chunk_ptr + row), tl.load(offset_ptr + row)
    start, count = tl.load(start_ptr + chunk), tl.load(count_ptr + chunk)
    lane = tl.arange(0, BLOCK_M)
    of_chunk = offset + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    valid = (lane < ROW_TOKENS * GROUP) & (of_chunk < count)
    token = (tl.load(first_ptr + chunk) + of_chunk).to(tl.int64)
    h = tl.arange(0, BLOCK_H)
    q_mask = valid[:, None] & (h[None, :] < SIZE)
    q = tl.load(q_ptr + (token[:, None] * HEADS + head[:, None]) * SIZE + h[None, :], mask=q_mask, other=0.0)
    kv_scale = tl.load(scale_ptr) if FP8 else 1.0
    last = start + of_chunk
    length = tl.minimum(start + offset + ROW_TOKENS, start + count)
    parts = tl.cdiv(tl.cdiv(length, BLOCK_L), SPLITS) * BLOCK_L
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for begin in range(split * parts, tl.minimum((split + 1) * parts, length), BLOCK_L):
        position = begin + tl.arange(0, BLOCK_L)
        inside = position < length
        block = tl.load(block_ptr + chunk * width + position // PAGE, mask=inside, other=0).to(tl.int64)
        key_at = ((block * 2 * KV_HEADS + kv_head) * PAGE + position % PAGE) * SIZE
        mask = inside[:, None] & (h[None, :] < SIZE)
        k = tl.load(pages_ptr + key_at[:, None] + h[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        scores = tl.dot(q, tl.trans(k)) * (softmax_scale * kv_scale)
        scores = tl.where(inside[None, :] & (position[None, :] <= last[:, None]), scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        v = tl.load(pages_ptr + key_at[:, None] + KV_HEADS * PAGE * SIZE + h[None, :], mask=mask, other=0.0).to(tl.bfloat16)
        sums = tl.dot(weights.to(tl.bfloat16), v, sums * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = now
    out = (split * tokens + token) * HEADS + head
    tl.store(sums_ptr + out[:, None] * SIZE + h[None, :], sums * kv_scale, mask=q_mask)
    tl.store(largest_ptr + out, largest, mask=valid)
    tl.store(total_ptr + out, total, mask=valid)


@triton.jit
def merge_kernel(
    sums_ptr, largest_ptr, total_ptr, out_scale_ptr, y_ptr, tokens, HEADS: tl.constexpr, SIZE: tl.constexpr,
    SPLITS: tl.constexpr, FP8_OUT: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One head of one token: the parts of its sums, brought to one largest score."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h = tl.arange(0, BLOCK_H)
    mask = h < SIZE
    largest = float("-inf")
    for split in tl.static_range(SPLITS):
        largest = tl.maximum(largest, tl.load(largest_ptr + (split * tokens + token) * HEADS + head))
    sums = tl.zeros((BLOCK_H,), tl.float32)
    total = 0.0
    for split in tl.static_range(SPLITS):
        at = (split * tokens + token) * HEADS + head
        shrink = tl.exp(tl.load(largest_ptr + at) - largest)
        total += tl.load(total_ptr + at) * shrink
        sums += tl.load(sums_ptr + at * SIZE + h, mask=mask, other=0.0) * shrink
    store_activation(y_ptr + (token * HEADS + head) * SIZE + h, sums / total, out_scale_ptr, mask, FP8_OUT)
