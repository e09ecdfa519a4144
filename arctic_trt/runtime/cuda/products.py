"""Matrix products of many rows by torch's own library, for weights as this engine has them, and where they can be had.

What the library takes and gives, as torch 2.8 to 2.13 have it (``aten/src/ATen/native/cuda``, ``torch/_meta_registrations.py``):

* ``_scaled_mm(x, w, scale_a, scale_b, out_dtype=)`` is cuBLASLt: e4m3 ``x`` [M, K] by rows and ``w`` [K, N] by columns, K and N
  multiples of 16; M is any. Two float32 scales of one element scale the float32 sum, which is then rounded to ``out_dtype``, bf16
  or float32. Compute capability 8.9 and later.
* ``_scaled_grouped_mm(x, w, scale_a, scale_b, offs=, out_dtype=)`` is CUTLASS: ``x`` [M, K] has the rows of group after group,
  ``w`` [G, K, N] lies by columns, K and N are multiples of 16, G is below 1,024. ``offs`` int32 [G] on the device has where each
  group ends: groups may be empty and begin anywhere, and rows from the last end on are neither read nor written. Scales are
  float32 of each row [M] and each column [G, N], whose last stride is 1 and whose first may be 0. The result is bf16.
  Compiled for compute capability 9.0 alone. A tile is 64 x 128 where groups have 128 rows or fewer on average, in clusters of
  2 x 2: a group costs as many operations as 128 rows, however few it has.
* ``_grouped_mm(x, w, offs=)`` is the same for bf16 without scales, where rows are multiples of 16 bytes. Compute capability 9.0
  and 10.0; elsewhere it reads ``offs`` on the host, which would wait for the device.
* ``mm(x, w, out_dtype=)`` gives float32 of bf16, on CUDA alone.

``use_fast_accum`` stays False: partial sums of e4m3 go to float32 every 128 terms, as in the Triton kernels. None of these waits
for the device. Grouped products in a replayed CUDA graph were reported to fail (pytorch issue 169970): they are not recorded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

FUNCTIONS = ("_scaled_mm", "_scaled_grouped_mm", "_grouped_mm", "mm.dtype")
"""Operators of torch that are used here, ``mm.dtype`` being the one with ``out_dtype``."""
ALIGNMENT = 16
"""Both sizes of a weight are multiples of this."""
WIDEST = 1 << 16
"""Columns of a grouped product at most, for which there are scales of 1."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """Which products the library has on a device: of e4m3, of bf16, and of experts in either."""

    fp8: bool
    bf16: bool
    grouped: bool


class Products(Protocol):
    """Products of rows with weights [out, in], or [E, out, in] of experts."""

    def dense(self, x: Tensor, weight: Tensor, alpha: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[T, in] to [T, out] in ``dtype``: e4m3 times ``alpha`` [1], bf16 and float32 without one."""

    def grouped(self, x: Tensor, weight: Tensor, scale_S: Tensor | None, end_E: Tensor) -> Tensor:
        """Rows [S, in] of expert after expert to bf16 [S, out], times ``scale_S`` where they are e4m3.

        Rows of expert e end before ``end_E[e]`` (int32); rows after the last expert's are anything.
        """


class TorchProducts:
    """See :class:`Products`; ``library`` has torch's functions."""

    def __init__(self, device: torch.device, library: Any = torch) -> None:
        self._library = library
        self._ones = torch.ones(WIDEST, device=device)

    def dense(self, x: Tensor, weight: Tensor, alpha: Tensor | None, dtype: torch.dtype) -> Tensor:
        y: Tensor
        if alpha is not None:
            y = self._library._scaled_mm(x, weight.t(), alpha, self._ones[:1], out_dtype=dtype)
        elif x.dtype == dtype:
            y = self._library.mm(x, weight.t())
        else:
            y = self._library.mm(x, weight.t(), out_dtype=dtype)
        return y

    def grouped(self, x: Tensor, weight: Tensor, scale_S: Tensor | None, end_E: Tensor) -> Tensor:
        y: Tensor
        if scale_S is None:
            y = self._library._grouped_mm(x, weight.transpose(1, 2), offs=end_E)
        else:
            scales = scale_S, self._ones[: weight.shape[1]].expand(weight.shape[:2])
            y = self._library._scaled_grouped_mm(x, weight.transpose(1, 2), *scales, offs=end_E, out_dtype=torch.bfloat16)
        return y


def plan_abilities(capability: tuple[int, int], functions: Collection[str]) -> Abilities:
    """What a GPU of this compute capability can do with those of :data:`FUNCTIONS` that its torch has."""
    return Abilities(
        fp8="_scaled_mm" in functions and capability >= (8, 9),
        bf16="mm.dtype" in functions,
        grouped={"_scaled_grouped_mm", "_grouped_mm"} <= set(functions) and capability == (9, 0),
    )


def functions_of_torch() -> set[str]:
    """Those of :data:`FUNCTIONS` that this torch has."""
    here = {name for name in FUNCTIONS if hasattr(torch, name)}
    return here | {f"mm.{overload}" for overload in torch.ops.aten.mm.overloads()} & set(FUNCTIONS)
