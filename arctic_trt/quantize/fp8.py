"""E4M3 numerics: amax, scale, cast and back. Nothing else lives here.

The formulas are NVIDIA ModelOpt's, on CPU: ``scale = float32(amax) / 448`` and ``code = cast(float32(w) / scale)`` with a true
division and a single rounding to nearest even. Multiplying by a reciprocal, or rounding through bf16, changes bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS = 1 << 18, 1 << 24
"""What a core's cache holds in float32; what is worth a GPU's launches."""


def amax(x: Tensor) -> Tensor:
    """Largest magnitude of ``x`` as a 0-d tensor of its dtype; NaN and infinity come through, for the caller to refuse."""
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low)


def scale_from_amax(value: Tensor) -> Tensor:
    """Float32 scale(s) for the given amax, any shape; an amax of zero gives 1.0, which loses nothing."""
    value = value.float()
    return torch.where(value == 0, torch.ones_like(value), value / torch.full_like(value, E4M3_MAX))


def cast_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """E4m3fn codes of ``x / scale`` (float32 scalar ``scale``), saturating at +-448.

    Works in chunks; a large ``x`` is never held in float32 as a whole. The divisor is a tensor beside ``x``: by a Python number,
    or by a tensor of the CPU, CUDA does not divide but multiplies by the rounded reciprocal.
    """
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    source, target, divisor = x.reshape(-1), out.view(-1), scale.reshape(1).to(x.device)
    chunk = CHUNK_ELEMENTS if x.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    for begin in range(0, source.numel(), chunk):
        part = slice(begin, begin + chunk)
        target[part].copy_(source[part].float().div(divisor).clamp_(-E4M3_MAX, E4M3_MAX))
    return out


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 values of e4m3 ``codes``; ``scale`` broadcasts."""
    return codes.float() * scale
