"""What several kernels do: begin early, prefetch weights, round a value before it is stored, know who is last."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

E4M3_MAX = tl.constexpr(448.0)
PREFETCH = tl.constexpr("""{
    .reg .u32 %thread;
    .reg .pred %first;
    mov.u32 %thread, %tid.x;
    setp.eq.u32 %first, %thread, 0;
    @%first cp.async.bulk.prefetch.L2.global [$1], $2;
    mov.u32 $0, 0;
}""")


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Before this, a kernel that was launched ``EARLY`` reads weights and the step's integers only, and writes nothing.

    Every kernel waits before it lets the next one begin, so that all launches but the one before are complete when it begins.
    """
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch(pointer, size):
    """Bring ``size`` bytes, a multiple of 16 as the address is, towards the L2 cache."""
    tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [pointer.to(tl.int64), size], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_lines(pointers):
    """Bring the 128 bytes around each address towards the L2 cache."""
    line: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(line, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def is_last(arrived_ptr, programs):
    """Whether ``programs - 1`` others have stored what they have; their values are read with ``.cg``.

    The counter is 0 before and after.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def activation(x, scale_ptr, dtype: tl.constexpr, FP8: tl.constexpr):
    """Float32 ``x`` as e4m3 codes of ``x / scale``, or in ``dtype``."""
    if FP8:
        x = tl.math.div_rn(x, tl.load(scale_ptr).to(tl.float32) + tl.zeros_like(x))
        x = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(dtype)


@triton.jit
def store_activation(pointer, x, scale_ptr, mask, FP8: tl.constexpr):
    """Store float32 ``x`` as e4m3 codes of ``x / scale``, or in the pointer's own type."""
    tl.store(pointer, activation(x, scale_ptr, pointer.dtype.element_ty, FP8), mask=mask)


@triton.jit
def silu(x):
    """``x * sigmoid(x)`` of float32."""
    return x / (1.0 + tl.exp(-x))
