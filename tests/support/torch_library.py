"""The products of torch's library for tests without a GPU: what CUDA's functions refuse is refused, and the rest is computed.

Arguments go to the real operators as fake tensors on "cuda" with the same strides, so the signatures, shapes, strides and dtypes
that are checked are those of the torch that is installed. What only the kernels check is checked here. Meta tensors are asked
about and not computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from arctic_trt.runtime.cuda.ops import Routed
from arctic_trt.runtime.cuda.twin import TwinOps, activation
from arctic_trt.runtime.kernels import Projection

MOST_GROUPS = 1023
MM = torch.ops.aten.mm.dtype


class TorchLibrary:
    """As much of ``torch`` as products take; ``calls`` are the names of what was called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def _scaled_mm(self, x: Tensor, w: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        like = self._ask(torch._scaled_mm, x, w, scale_a, scale_b, **options)
        _check_pointers(x, w)
        return like if x.is_meta else (x.double() @ w.double() * scale_a * scale_b).to(like.dtype)

    def _scaled_grouped_mm(self, x: Tensor, w: Tensor, scale_a: Tensor, scale_b: Tensor, **options: Any) -> Tensor:
        like = self._ask(torch._scaled_grouped_mm, x, w, scale_a, scale_b, **options)
        return _groups(x, w, options["offs"], like, scale_a, scale_b)

    def _grouped_mm(self, x: Tensor, w: Tensor, **options: Any) -> Tensor:
        like = self._ask(torch._grouped_mm, x, w, **options)
        return _groups(x, w, options["offs"], like)

    def mm(self, x: Tensor, w: Tensor, **options: Any) -> Tensor:
        self.calls.append("mm")
        if options:
            MM(x.to("meta"), w.to("meta"), **options)
            assert x.dtype == w.dtype == torch.bfloat16
        else:
            torch.mm(x.to("meta"), w.to("meta"))
        return (x.double() @ w.double()).to(options.get("out_dtype", x.dtype))

    def _ask(self, function: Any, *tensors: Tensor, **options: Any) -> Tensor:
        """What the real function would give on a GPU, of tensors that lie like these."""
        self.calls.append(function.__name__)
        with FakeTensorMode():

            def fake(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

            like = function(*map(fake, tensors), **{name: fake(value) for name, value in options.items()})
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


class RoundedTwin(TwinOps):
    """Operations whose experts are multiplied one by one, with products that are rounded to bf16."""

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        token_S = (torch.arange(len(routed.expert_S)) // routed.top_k).tolist()
        linear, activated = _one_by_one(x, token_S, routed, fc).chunk(2, -1)
        return activation(F.silu(activated) * linear, proj)

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        return _one_by_one(inner, list(range(len(inner))), routed, proj) * routed.share_S[:, None]


def _one_by_one(x: Tensor, rows: list[int], routed: Routed, projection: Projection) -> Tensor:
    products = []
    for row, expert in zip(rows, routed.expert_S.tolist(), strict=True):
        alpha = 1.0 if projection.alpha is None else projection.alpha[expert]
        products.append(projection.weight[expert].double() @ x[row].double() * alpha)
    return torch.stack(products).bfloat16().float()


def _groups(x: Tensor, w: Tensor, offs: Tensor, like: Tensor, scale_a: Tensor | None = None, scale_b: Any = None) -> Tensor:
    _check_pointers(x, w)
    assert len(w) <= MOST_GROUPS
    if x.is_meta:
        return like
    ends = offs.tolist()
    assert ends == sorted(ends) and ends[0] >= 0 and ends[-1] <= len(x), ends
    y = torch.full((len(x), w.shape[2]), torch.nan, dtype=torch.float64)
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        y[begin:end] = x[begin:end].double() @ w[group].double()
        if scale_a is not None:
            y[begin:end] *= scale_a[begin:end, None] * scale_b[group]
    return y.to(like.dtype)


def _check_pointers(*tensors: Tensor) -> None:
    assert all(tensor.is_meta or tensor.data_ptr() % 16 == 0 for tensor in tensors)
