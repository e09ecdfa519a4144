"""Which experts a token goes to."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits_ptr, expert_ptr, share_ptr, num_experts, first_held, held, TOP_K: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the ``TOP_K`` largest logits, whose softmax among themselves are the shares; ``PARTS`` sums make up a logit."""
    token, tokens = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BLOCK)
    logits = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        logits += tl.load(logits_ptr + (part * tokens + token) * num_experts + e, mask=e < num_experts, other=0.0)
    logits = tl.where(e < num_experts, logits, float("-inf"))
    largest = tl.max(logits, 0)
    total = 0.0
    left = logits
    for _ in tl.static_range(TOP_K):
        chosen = tl.argmax(left, 0)
        total += tl.exp(tl.max(left, 0) - largest)
        left = tl.where(e == chosen, float("-inf"), left)
    left = logits
    for k in tl.static_range(TOP_K):
        chosen = tl.argmax(left, 0)
        share = tl.exp(tl.max(left, 0) - largest) / total
        left = tl.where(e == chosen, float("-inf"), left)
        local = chosen - first_held
        tl.store(expert_ptr + token * TOP_K + k, tl.where((local >= 0) & (local < held), local, -1))
        tl.store(share_ptr + token * TOP_K + k, share)


@triton.jit
def logits_kernel(x_ptr, w_ptr, y_ptr, tokens, num_experts, length, span, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Logits of a block of tokens and one of experts, summed over a part of the length; float32 throughout."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(part * span, tl.minimum((part + 1) * span, length), BK):
        k = begin + tl.arange(0, BK)
        x = tl.load(x_ptr + m[:, None] * length + k[None, :], mask=(m[:, None] < tokens) & (k[None, :] < length), other=0.0)
        w_mask = (n[:, None] < num_experts) & (k[None, :] < length)
        w = tl.load(w_ptr + n[:, None] * length + k[None, :], mask=w_mask, other=0.0).to(tl.float32)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    y_at = y_ptr + (part * tokens + m[:, None]) * num_experts + n[None, :]
    tl.store(y_at, total, mask=(m[:, None] < tokens) & (n[None, :] < num_experts))
