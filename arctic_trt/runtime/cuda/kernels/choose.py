"""Choosing tokens, and looking them up: where a step's end meets the beginning of the next.

A row of logits is read again and again, in parts of ``BLOCK``, from a cache that holds it whole. Limits are found by halving the
range between two numbers, in the order of their bits, until one value is left between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LOWEST_KEY = tl.constexpr(-0x7F800000)
HIGHEST_KEY = tl.constexpr(0x7F800000)
NOTHING = tl.constexpr(float("-inf"))
BROKEN = tl.constexpr(-1)
FIELDS = tl.constexpr(5)


@triton.jit
def float_of_key(key):
    """Float32 in the order of integers: of ``LOWEST_KEY`` the lowest one, of ``HIGHEST_KEY`` infinity."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def find_limit(x_ptr, vocab, goal, BY_SUM: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value such that ``goal`` values are not below it, or values whose sum is ``goal``.

    Returns it with the number and the sum of the values above it.
    """
    column = tl.arange(0, BLOCK)
    low, high = tl.full((), LOWEST_KEY, tl.int64), tl.full((), HIGHEST_KEY, tl.int64)
    at_low, at_high, sum_high = vocab, 0, tl.full((), 0.0, tl.float64)
    while (high - low > 1) & (at_low - at_high > 1):
        middle = (low + high) >> 1
        limit = float_of_key(middle)
        counts, sums = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, vocab, BLOCK):
            x = tl.load(x_ptr + begin + column, mask=begin + column < vocab, other=NOTHING)
            counts += (x >= limit).to(tl.int32)
            if BY_SUM:
                sums += tl.where(x >= limit, x, 0.0)
        count, total = tl.sum(counts, 0), tl.sum(sums.to(tl.float64), 0)
        enough = count >= goal
        if BY_SUM:
            enough = total >= goal
        low, at_low = tl.where(enough, middle, low), tl.where(enough, count, at_low)
        high, at_high = tl.where(enough, high, middle), tl.where(enough, at_high, count)
        sum_high = tl.where(enough, sum_high, total)
    limit, smallest = float_of_key(low), tl.full((BLOCK,), float("inf"), tl.float32)
    for begin in range(0, vocab, BLOCK):
        x = tl.load(x_ptr + begin + column, mask=begin + column < vocab, other=NOTHING)
        smallest = tl.minimum(smallest, tl.where(x >= limit, x, float("inf")))
    return tl.min(smallest, 0), at_high, sum_high


@triton.jit
def find_likeliest(x_ptr, vocab, BLOCK: tl.constexpr):
    """The largest logit, the first token that has it, and how many logits are not finite."""
    column = tl.arange(0, BLOCK)
    best, where = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, vocab, BLOCK):
        mask = begin + column < vocab
        x = tl.load(x_ptr + begin + column, mask=mask, other=-LARGEST_FLOAT)
        finite = tl.abs(x) <= LARGEST_FLOAT
        broken += tl.where(finite, 0, 1)
        better = mask & finite & (x > best)
        best, where = tl.where(better, x, best), tl.where(better, begin + column, where)
    largest = tl.max(best, 0)
    return largest, tl.min(tl.where(best == largest, where, vocab), 0), tl.sum(broken, 0)


@triton.jit
def weigh(x_ptr, weight_ptr, vocab, largest, temperature, top_k, BLOCK: tl.constexpr):
    """Write the weights of the ``top_k`` likeliest tokens, and 0 for others; returns the last one's logit and their sum."""
    column = tl.arange(0, BLOCK)
    edge, left, share = tl.full((), NOTHING, tl.float32), 0, (1.0 / temperature).to(tl.float64)
    for _turn in tl.static_range(2):  # Newton's: a division of float64 is a call, which all registers have to survive
        share = share * (2.0 - temperature.to(tl.float64) * share)
    if (top_k > 0) & (top_k < vocab):
        edge, above, _ = find_limit(x_ptr, vocab, top_k, False, BLOCK)
        left = top_k - above
    sums = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, vocab, BLOCK):
        mask = begin + column < vocab
        x = tl.load(x_ptr + begin + column, mask=mask, other=NOTHING)
        equal = (mask & (x == edge)).to(tl.int32)
        kept = (x > edge) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
        left -= tl.sum(equal, 0)
        colder = ((x - largest).to(tl.float64) * share).to(tl.float32)  # as if it were divided, but for one in 2**28
        weight = tl.where(kept, tl.exp(colder), 0.0)
        tl.store(weight_ptr + begin + column, weight, mask=mask)
        sums += weight.to(tl.float64)
    tl.debug_barrier()
    return edge, tl.sum(sums, 0)


@triton.jit
def is_last(x_ptr, weight, at, mask, edge, by_weight):
    """Whether a token is among those that were only kept as the first of some that are alike, by its weight or by its logit."""
    return tl.where(by_weight, weight, tl.load(x_ptr + at, mask=mask, other=NOTHING)) == edge


@triton.jit
def restrict(x_ptr, weight_ptr, vocab, edge, total, top_p, min_p, BLOCK: tl.constexpr):
    """Set the weights to 0 that ``top_p`` and ``min_p`` leave out.

    Returns which tokens come last, by the logit or weight that they have, and the sums of the others and of these.
    """
    column = tl.arange(0, BLOCK)
    by_weight = top_p < 1.0
    limit, missing, met = tl.full((), NOTHING, tl.float32), tl.full((), 0.0, tl.float64), 0
    if by_weight:
        limit, _, before = find_limit(weight_ptr, vocab, top_p * total, True, BLOCK)
        missing, edge = top_p * total - before, limit
    value = tl.where(by_weight, limit, 0.0).to(tl.float64)
    first, last = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, vocab, BLOCK):
        at, mask = begin + column, begin + column < vocab
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        equal = (mask & (weight == limit)).to(tl.int32)
        earlier = met + tl.cumsum(equal, 0) - equal
        needed = (equal > 0) & ((earlier == 0) | (earlier.to(tl.float64) * value < missing))
        kept = tl.where(((weight > limit) | needed) & (weight >= min_p), weight, 0.0)
        met += tl.sum(equal, 0)
        behind = is_last(x_ptr, weight, at, mask, edge, by_weight)
        tl.store(weight_ptr + at, kept, mask=mask)
        first += tl.where(behind, 0.0, kept).to(tl.float64)
        last += tl.where(behind, kept, 0.0).to(tl.float64)
    tl.debug_barrier()
    return edge, by_weight, tl.sum(first, 0), tl.sum(last, 0)


@triton.jit
def pick(x_ptr, weight_ptr, vocab, edge, by_weight, first, last, uniform, BLOCK: tl.constexpr):
    """The token in which ``uniform`` of all weights ends."""
    column = tl.arange(0, BLOCK)
    target = uniform * (first + last)
    among_last = (target >= first) & (last > 0)
    target = tl.where(among_last, target - first, target)
    before = tl.full((), 0.0, tl.float64)
    found, able = vocab, 0
    for begin in range(0, vocab, BLOCK):
        at, mask = begin + column, begin + column < vocab
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
        mine = (weight > 0) & (is_last(x_ptr, weight, at, mask, edge, by_weight) == among_last)
        share = tl.where(mine, weight, 0.0).to(tl.float64)
        ends = before + tl.cumsum(share, 0)
        found = tl.minimum(found, tl.min(tl.where(mine & (ends > target), at, vocab), 0))
        able = tl.maximum(able, tl.max(tl.where(mine, at, 0), 0))
        before += tl.sum(share, 0)
    return tl.where(found < vocab, found, able)


@triton.jit
def choose_token_kernel(x_ptr, row_ptr, choice_ptr, weight_ptr, token_ptr, vocab, stride, BLOCK: tl.constexpr):
    """One choice: the likeliest token, or one that is drawn; of a row that is not finite none."""
    place = tl.program_id(0)
    x_ptr += tl.load(row_ptr + place).to(tl.int64) * stride
    weight_ptr += place.to(tl.int64) * vocab
    choice_ptr += place * FIELDS
    largest, token, broken = find_likeliest(x_ptr, vocab, BLOCK)
    temperature = tl.load(choice_ptr).to(tl.float32)
    if (temperature > 0) & (broken == 0):
        top_k = tl.minimum(tl.load(choice_ptr + 1), vocab).to(tl.int32)
        edge, total = weigh(x_ptr, weight_ptr, vocab, largest, temperature, top_k, BLOCK)
        top_p, min_p = tl.load(choice_ptr + 2), tl.load(choice_ptr + 3).to(tl.float32)
        edge, by_weight, first, last = restrict(x_ptr, weight_ptr, vocab, edge, total, top_p, min_p, BLOCK)
        token = pick(x_ptr, weight_ptr, vocab, edge, by_weight, first, last, tl.load(choice_ptr + 4), BLOCK)
    tl.store(token_ptr + place, tl.where(broken > 0, BROKEN, token))


@triton.jit
def embed_kernel(token_ptr, chosen_ptr, rows_ptr, out_ptr, first, held, hidden, BLOCK: tl.constexpr):
    """A part of a token's row, or zeros if another rank has it; a token below 0 is ``chosen[-1 - token]``."""
    place = tl.program_id(0)
    token = tl.load(token_ptr + place)
    if token < 0:
        token = tl.load(chosen_ptr - 1 - token)
    local = token - first
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < tl.where((local >= 0) & (local < held), hidden, 0)
    row = tl.load(rows_ptr + local.to(tl.int64) * hidden + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + place.to(tl.int64) * hidden + column, row, mask=column < hidden)
