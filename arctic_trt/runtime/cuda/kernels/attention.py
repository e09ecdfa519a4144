"""Attention over a paged cache, and what is stored into it.

Keys and values are e4m3 codes, which bf16 represents exactly, or float32; their scale is taken out of the sums. A block of rows
holds all query heads of one KV head for some tokens of one chunk. Parts of a long sequence are summed by programs of their own,
the last of which merges them, always in the same order.

Where a step takes one token of each sequence, the programs rotate its query themselves. The last part's stores its key and value,
and adds them from where they are; no program reads what one of the same launch stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import activation, is_last, prefetch_lines, store_activation, wait_for_inputs


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
    q_ptr, cos_ptr, sin_ptr, position_ptr, slot_ptr, pages_ptr, scale_ptr, start_ptr, count_ptr, first_ptr, block_ptr,
    chunk_ptr, offset_ptr, sums_ptr, largest_ptr, total_ptr, arrived_ptr, out_scale_ptr, y_ptr, tokens, width,
    softmax_scale, SINGLE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    SIZE: tl.constexpr, PAGE: tl.constexpr, FP8: tl.constexpr, FP8_OUT: tl.constexpr, EARLY: tl.constexpr,
    ROW_TOKENS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One block of rows, one KV head, a part of the positions; ``SINGLE`` reads products [T, (N + 2 K) H], else queries."""
    kv_head, split = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) if SINGLE else tl.num_programs(0) - 1 - tl.program_id(0)  # rows that see most begin first
    chunk, offset = tl.load(chunk_ptr + row), tl.load(offset_ptr + row)
    start, count = tl.load(start_ptr + chunk), tl.load(count_ptr + chunk)
    lane, h = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    of_chunk = offset + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    valid = (lane < ROW_TOKENS * GROUP) & (of_chunk < count)
    first = tl.load(first_ptr + chunk)
    token = (first + of_chunk).to(tl.int64)
    q_mask = valid[:, None] & (h[None, :] < SIZE)
    kv_scale = tl.load(scale_ptr) if FP8 else 1.0
    factor, last = softmax_scale * kv_scale, start + of_chunk
    length = start if SINGLE else tl.minimum(start + offset + ROW_TOKENS, start + count)
    parts = tl.cdiv(tl.cdiv(length, BLOCK_L), SPLITS) * BLOCK_L
    end = tl.minimum((split + 1) * parts, length)
    blocks_at = block_ptr + chunk * width
    if SINGLE:
        here = tl.where(count > 0, first, 0).to(tl.int64)  # a chunk without a token repeats what the first token's does
        slot = tl.load(slot_ptr + here).to(tl.int64)
        table = tl.load(position_ptr + here).to(tl.int64) * SIZE + h
        cos, sin = tl.load(cos_ptr + table, mask=h < SIZE, other=0.0), tl.load(sin_ptr + table, mask=h < SIZE, other=0.0)
        if EARLY:
            _prefetch_cached(blocks_at, pages_ptr, split * parts, end, kv_head, KV_HEADS, PAGE, SIZE, BLOCK_L)
    wait_for_inputs(EARLY)
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINGLE:
        heads_at = q_ptr + here * (HEADS + 2 * KV_HEADS) * SIZE
        q = _rotated(heads_at + head[:, None] * SIZE, h[None, :], cos[None, :], sin[None, :], q_mask, SIZE).to(tl.bfloat16)
        if split == SPLITS - 1:
            key_at = heads_at + (HEADS + kv_head) * SIZE
            k, v = _store_new(key_at, pages_ptr, slot, kv_head, h, cos, sin, scale_ptr, KV_HEADS, PAGE, SIZE, FP8)
            largest = tl.sum(q.to(tl.float32) * k[None, :], 1) * factor
            total += 1.0
            sums += v[None, :]
    else:
        q = tl.load(q_ptr + (token[:, None] * HEADS + head[:, None]) * SIZE + h[None, :], mask=q_mask, other=0.0)
    sums, largest, total = _add_cached(
        sums, largest, total, q, last, h, split * parts, end, blocks_at, pages_ptr, kv_head, factor, KV_HEADS, PAGE, SIZE, BLOCK_L
    )
    sums *= kv_scale
    place = token * HEADS + head
    if SPLITS > 1:
        out = split * tokens * HEADS + place
        _store_part(sums_ptr, largest_ptr, total_ptr, out, h, sums, largest, total, valid, SIZE)
        if not is_last(arrived_ptr + row * KV_HEADS + kv_head, SPLITS):
            return
        sums, total = _merged(sums_ptr, largest_ptr, total_ptr, place, tokens * HEADS, h, valid, SIZE, SPLITS)
    y_at = y_ptr + place[:, None] * SIZE + h[None, :]
    store_activation(y_at, sums / total[:, None], out_scale_ptr, q_mask, FP8_OUT)


@triton.jit
def _add_cached(
    sums, largest, total, q, last, h, begin, end, blocks_at, pages_ptr, kv_head, factor, KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr, SIZE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """What queries up to positions ``last`` see of positions ``begin`` to ``end``, added to what they have seen."""
    for first in range(begin, end, BLOCK_L):
        position = first + tl.arange(0, BLOCK_L)
        at = _positions_at(blocks_at, position, end, kv_head, KV_HEADS, PAGE, SIZE)
        at = pages_ptr + at[:, None] + h[None, :]
        mask = (position < end)[:, None] & (h[None, :] < SIZE)
        k = _bf16(tl.load(at, mask=mask, other=0.0))
        v = _bf16(tl.load(at + KV_HEADS * PAGE * SIZE, mask=mask, other=0.0))
        seen = (position < end)[None, :] & (position[None, :] <= last[:, None])
        scores = tl.where(seen, tl.dot(q, tl.trans(k)) * factor, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        sums = tl.dot(weights.to(tl.bfloat16), v, sums * shrink[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = now
    return sums, largest, total


@triton.jit
def _positions_at(block_ptr, position, length, kv_head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr):
    """Where the keys of positions below ``length`` lie among the pages, by the sequence's blocks."""
    block = tl.load(block_ptr + position // PAGE, mask=position < length, other=0).to(tl.int64)
    return ((block * 2 * KV_HEADS + kv_head) * PAGE + position % PAGE) * SIZE


@triton.jit
def _prefetch_cached(
    blocks_at, pages_ptr, begin, end, kv_head, KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Keys and values of positions ``begin`` to ``end``, as far as 128 bytes of each go."""
    for first in range(begin, end, BLOCK_L):
        at = _positions_at(blocks_at, first + tl.arange(0, BLOCK_L), end, kv_head, KV_HEADS, PAGE, SIZE)
        prefetch_lines(pages_ptr + at)
        prefetch_lines(pages_ptr + at + KV_HEADS * PAGE * SIZE)


@triton.jit
def _store_new(
    key_at, pages_ptr, slot, kv_head, h, cos, sin, scale_ptr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    SIZE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A token's key and value go to their ``slot``; returns them as they are read from there, float32."""
    page_at = pages_ptr + ((slot // PAGE * 2 * KV_HEADS + kv_head) * PAGE + slot % PAGE) * SIZE + h
    k = activation(_rotated(key_at, h, cos, sin, h < SIZE, SIZE), scale_ptr, page_at.dtype.element_ty, FP8)
    v = tl.load(key_at + KV_HEADS * SIZE + h, mask=h < SIZE, other=0.0)
    v = activation(v, scale_ptr, page_at.dtype.element_ty, FP8)
    tl.store(page_at, k, mask=h < SIZE)
    tl.store(page_at + KV_HEADS * PAGE * SIZE, v, mask=h < SIZE)
    return _bf16(k).to(tl.float32), _bf16(v).to(tl.float32)


@triton.jit
def _bf16(x):
    """By way of float32: the instruction that makes bf16 of what e4m3 is decoded to is eight times slower than two others."""
    return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def _rotated(at, h, cos, sin, mask, SIZE: tl.constexpr):
    """Elements ``h`` of the head at ``at``, each mixed with its partner in the other half."""
    x = tl.load(at + h, mask=mask, other=0.0)
    partner = tl.load(at + (h + SIZE // 2) % SIZE, mask=mask, other=0.0)
    return x * cos + tl.where(h < SIZE // 2, -partner, partner) * sin


@triton.jit
def _store_part(sums_ptr, largest_ptr, total_ptr, at, h, sums, largest, total, valid, SIZE: tl.constexpr):
    tl.store(sums_ptr + at[:, None] * SIZE + h[None, :], sums, mask=valid[:, None] & (h[None, :] < SIZE))
    tl.store(largest_ptr + at, largest, mask=valid)
    tl.store(total_ptr + at, total, mask=valid)


@triton.jit
def _merged(sums_ptr, largest_ptr, total_ptr, place, stride, h, valid, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of the rows' sums and weights, brought to one largest score."""
    largest = tl.full(place.shape, float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        part = tl.load(largest_ptr + split * stride + place, mask=valid, other=0.0, cache_modifier=".cg")
        largest = tl.maximum(largest, part)
    mask = valid[:, None] & (h[None, :] < SIZE)
    sums = tl.zeros((place.shape[0], h.shape[0]), tl.float32)
    total = tl.zeros(place.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * stride + place
        part = tl.load(largest_ptr + at, mask=valid, other=0.0, cache_modifier=".cg")
        shrink = tl.exp(part - largest)
        total += tl.load(total_ptr + at, mask=valid, other=0.0, cache_modifier=".cg") * shrink
        part_sums = tl.load(sums_ptr + at[:, None] * SIZE + h[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        sums += part_sums * shrink[:, None]
    return sums, total
