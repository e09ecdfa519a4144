"""How much memory a quantization takes, and how it fits into what it may have."""

from __future__ import annotations

from dataclasses import dataclass

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.machine import available_memory
from arctic_trt.model.config import ArcticConfig

BASE_BYTES = 350 << 20
"""Interpreter and libraries, measured with torch 2.13 on CPU, and a margin."""
EXPERT_ROWS = 2048
"""Rows that pass an expert in one matrix product, at most."""
MAX_DEPTH = 4
MIN_DEPTH = 2
SAFE_SHARE = 0.7
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """``depth`` experts in flight, hidden states in memory or in a file, threads at work, and the peak that this makes."""

    depth: int
    spill: bool
    peak_bytes: int
    workers: int


def plan_memory(config: ArcticConfig, *, tokens: int, batch_tokens: int, workers: int, budget_bytes: int) -> MemoryPlan:
    """Choose the widest plan within the budget; raises :class:`RefusedError` when even the narrowest does not fit.

    ``tokens`` are all calibration tokens, ``batch_tokens`` those of the largest batch, ``workers`` the threads that there are
    cores for. Threads are given up last: each has matrices of its own in work, and on a large machine they decide.
    """
    for threads in range(workers, 0, -1):
        for spill in (False, True) if tokens else (False,):
            for depth in range(MAX_DEPTH, MIN_DEPTH - 1, -1):
                peak = estimate_peak(config, tokens=tokens, batch_tokens=batch_tokens, workers=threads, depth=depth, spill=spill)
                if peak <= budget_bytes:
                    return MemoryPlan(depth, spill, peak, threads)
    raise RefusedError(
        f"The memory budget of {budget_bytes / 2**30:.2f} GiB is too small: this checkpoint needs {peak / 2**30:.2f} GiB.",
        "Raise --memory_budget, or lower --batch_size or --calib_max_seq_length.",
    )


def estimate_peak(config: ArcticConfig, *, tokens: int, batch_tokens: int, workers: int, depth: int, spill: bool) -> int:
    """Peak resident bytes. Neither layers nor the number of experts nor the size of the checkpoint appear in it."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    embedding = 2 * 2 * config.vocab_size * hidden
    dense = 2 * (5 * hidden * hidden + 2 * config.kv_size * hidden)
    expert = 2 * 3 * ffn * hidden
    cast = workers * max(expert, 2 * 2 * hidden * hidden)
    rows = 0 if spill else 3 * 2 * tokens * hidden
    expert_rows = min(tokens, EXPERT_ROWS)
    moe = workers * expert_rows * (hidden * (2 + 2 + 4 + 2) + ffn * 2 * 3)
    attention = workers * batch_tokens * hidden * (4 * 3 + 2 * 9)
    return BASE_BYTES + rows + max(embedding, dense + depth * expert + cast + max(moe, attention))


def default_budget() -> int:
    """A safe share of what is free now, also inside a container."""
    return int(SAFE_SHARE * available_memory())


def parse_size(text: str, flag: str = "--memory_budget") -> int:
    """Bytes of ``8GiB``, ``500MB``, ``1.5g`` or a plain number; raises :class:`UsageError`."""
    number = text.strip().lower().removesuffix("b")
    digits = number.rstrip("kmgti")
    try:
        size = int(float(digits) * UNITS[number[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{flag} {text!r} is not a size.", "Write it as 8GiB, 500MB or a number of bytes.") from None
    if size <= 0:
        raise UsageError(f"{flag} {text!r} is not positive.")
    return size
