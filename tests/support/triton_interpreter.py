"""Triton's interpreter with casts as devices round them, and products of bf16.

The interpreter's own casts forget the carry of a mantissa that rounds up to the next power of two, and round ties away from even;
its products take the bits of bf16 for integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp64": torch.float64,
}


def convert_float(values: Any, source: Any, target: Any, rounding_mode: object) -> Any:
    """The bits of ``values`` (bits too) in another format, rounded to nearest even."""
    bits = np.ascontiguousarray(values)
    given = torch.from_numpy(np.frombuffer(bits.tobytes(), np.uint8).copy()).view(DTYPES[source.name])
    unsigned = getattr(np, f"uint{target.primitive_bitwidth}")
    return np.frombuffer(given.to(DTYPES[target.name]).view(torch.uint8).numpy().tobytes(), unsigned).reshape(bits.shape)


def float32(handle: Any) -> Any:
    """A tensor's values as numpy has them."""
    from triton import language as tl

    return convert_float(handle.data, handle.dtype.scalar, tl.float32, None).view(np.float32)


def create_dot(builder: Any, a: Any, b: Any, total: Any, input_precision: object, max_num_imprecise_acc: object) -> Any:
    """The product in float32."""
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(np.matmul(float32(a), float32(b)) + total.data, total.dtype.scalar)


def use_exact_arithmetic() -> None:
    """From now on, in this process."""
    from triton.runtime import interpreter

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
