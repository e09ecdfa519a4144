"""What is wrong with a tensor by itself, and how far it is from what it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from arctic_trt.checkpoint.tensors import flat_bytes
from arctic_trt.report.verify.findings import Verification

CHUNK_ELEMENTS = 1 << 20
UNITS = {torch.float8_e4m3fn: "e4m3", torch.bfloat16: "bf16", torch.float32: "float32"}
MAGNITUDE_BITS = 0x7F
E4M3_NAN = 0x7F


def check_numbers(
    values: Tensor, file: str, name: str, found: Verification, *, where: str = "", may_be_zero: bool = False
) -> None:
    """What is wrong with a tensor of e4m3, bfloat16 or float32, or ``where`` in it, by itself."""
    if values.dtype == torch.float8_e4m3fn:
        largest = int((values.view(torch.uint8) & MAGNITUDE_BITS).max())
        finite, zero = largest != E4M3_NAN, largest == 0
    else:
        low, high = torch.aminmax(values)
        finite, zero = bool(low.isfinite() and high.isfinite()), bool(low == 0 and high == 0)
    if not finite:
        found.error("not finite", file, name, f"{where or name} holds NaN or infinity.")
    elif zero and not may_be_zero:
        found.error("zero", file, name, f"{where or name} is zero throughout.")


def steps_from_zero(values: Tensor) -> Tensor:
    """How many numbers of its dtype lie between 0 and each value, int64; negative for negative values, 0 for both zeros."""
    bits = values.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[values.element_size()]).long()
    magnitude = bits & ((1 << (8 * values.element_size() - 1)) - 1)
    return torch.where(bits < 0, -magnitude, magnitude)


def describe_difference(stored: Tensor, expected: Tensor) -> str:
    """In how many elements two tensors of one shape and dtype differ, and by how much the farthest."""
    count, farthest = 0, 0
    a, b = stored.reshape(-1), expected.reshape(-1)
    for begin in range(0, a.numel(), CHUNK_ELEMENTS):
        part = slice(begin, begin + CHUNK_ELEMENTS)
        count += int((flat_bytes(a[part]) != flat_bytes(b[part])).view(-1, a.element_size()).any(1).sum())
        farthest = max(farthest, int((steps_from_zero(a[part]) - steps_from_zero(b[part])).abs().max()))
    return f"in {count} of {a.numel()} elements, by up to {farthest} {UNITS[stored.dtype]} step{'s' if farthest != 1 else ''}"
