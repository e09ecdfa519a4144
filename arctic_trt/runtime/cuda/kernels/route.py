"""Which experts a token goes to, and where its slots lie among those of other tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from arctic_trt.runtime.cuda.kernels.common import is_last, wait_for_inputs


@triton.jit
def route_kernel(
    x_ptr, w_ptr, logits_ptr, arrived_ptr, expert_ptr, share_ptr, tokens, num_experts, length, span, first_held, held,
    TOP_K: tl.constexpr, FEW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Logits of a block of tokens and one of experts over a part of the length, in float32; the last program chooses."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    if FEW:
        products = tl.zeros((BM, BN, BK), tl.float32)
    else:
        total = tl.zeros((BM, BN), tl.float32)
    for begin in tl.range(part * span, tl.minimum((part + 1) * span, length), BK, num_stages=STAGES):
        k = begin + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * length + k[None, :], mask=(m[:, None] < tokens) & (k[None, :] < length), other=0.0)
        w_mask = (n[:, None] < num_experts) & (k[None, :] < length)
        w = tl.load(w_ptr + n[:, None] * length + k[None, :], mask=w_mask, other=0.0).to(tl.float32)
        if FEW:
            products += x[:, None, :] * w[None, :, :]
        else:
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if FEW:
        total = tl.sum(products, 2)
    y_at = logits_ptr + (part * tokens + m[:, None]) * num_experts + n[None, :]
    tl.store(y_at, total, mask=(m[:, None] < tokens) & (n[None, :] < num_experts))
    if is_last(arrived_ptr + tl.program_id(1), tl.num_programs(0) * PARTS):
        choose(logits_ptr, expert_ptr, share_ptr, m, tokens, num_experts, first_held, held, TOP_K, PARTS, BLOCK_E)


@triton.jit
def choose(
    logits_ptr, expert_ptr, share_ptr, m, tokens, num_experts, first_held, held, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The ``TOP_K`` largest logits of tokens ``m``, whose softmax among themselves are the shares; ``PARTS`` make up a logit."""
    e = tl.arange(0, BLOCK_E)
    mask = (m[:, None] < tokens) & (e[None, :] < num_experts)
    logits = tl.zeros((m.shape[0], BLOCK_E), tl.float32)
    for part in tl.static_range(PARTS):
        at = logits_ptr + (part * tokens + m[:, None]) * num_experts + e[None, :]
        logits += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    logits = tl.where(e[None, :] < num_experts, logits, float("-inf"))
    largest = tl.max(logits, 1)
    total = tl.zeros(m.shape, tl.float32)
    left = logits
    for _ in tl.static_range(TOP_K):
        total += tl.exp(tl.max(left, 1) - largest)
        left = tl.where(e[None, :] == tl.argmax(left, 1)[:, None], float("-inf"), left)
    left = logits
    for k in tl.static_range(TOP_K):
        chosen = tl.argmax(left, 1)
        share = tl.exp(tl.max(left, 1) - largest) / total
        left = tl.where(e[None, :] == chosen[:, None], float("-inf"), left)
        local = chosen - first_held
        tl.store(expert_ptr + m * TOP_K + k, tl.where((local >= 0) & (local < held), local, -1), mask=m < tokens)
        tl.store(share_ptr + m * TOP_K + k, share, mask=m < tokens)


@triton.jit
def plan_kernel(
    expert_ptr, slot_ptr, block_ptr, slots, blocks, num_experts, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """:func:`arctic_trt.runtime.cuda.ops.plan_blocks` in one program."""
    e, s = tl.arange(0, EXPERTS), tl.arange(0, CHUNK)
    wait_for_inputs(EARLY)
    count = tl.zeros((EXPERTS,), tl.int32)
    for begin in range(0, slots, CHUNK):
        expert = tl.load(expert_ptr + begin + s, mask=begin + s < slots, other=-1)
        count += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    padded = (count + BLOCK - 1) // BLOCK * BLOCK
    end = tl.cumsum(padded, 0)
    r = tl.arange(0, BLOCKS)
    of_block = tl.sum((end[None, :] <= r[:, None] * BLOCK).to(tl.int32), 1)
    tl.store(block_ptr + r, tl.where(of_block < num_experts, of_block, -1), mask=r < blocks)
    for begin in range(0, blocks * BLOCK, CHUNK):
        tl.store(slot_ptr + begin + s, tl.zeros((CHUNK,), tl.int32) + slots, mask=begin + s < blocks * BLOCK)
    tl.debug_barrier()
    free = end - padded
    for begin in range(0, slots, CHUNK):
        expert = tl.load(expert_ptr + begin + s, mask=begin + s < slots, other=-1)
        chosen = expert[:, None] == e[None, :]
        earlier = (expert[:, None] == expert[None, :]) & (s[None, :] < s[:, None])
        place = tl.sum(tl.where(chosen, free[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(slot_ptr + place, begin + s, mask=expert >= 0)
        free += tl.sum(chosen.to(tl.int32), 0)
