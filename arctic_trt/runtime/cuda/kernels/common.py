"""What several kernels do with a value before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def store_activation(pointer, x, scale_ptr, mask, FP8: tl.constexpr):
    """Store float32 ``x`` as e4m3 codes of ``x / scale``, or in the pointer's own type."""
    if FP8:
        x = tl.math.div_rn(x, tl.load(scale_ptr).to(tl.float32) + tl.zeros_like(x))
        x = tl.clamp(x, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def silu(x):
    """``x * sigmoid(x)`` of float32."""
    return x / (1.0 + tl.exp(-x))
