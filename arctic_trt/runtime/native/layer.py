"""A layer as the library takes it: one structure of pointers, made once, and two calls a step."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from arctic_trt.runtime.kernels import Projection
from arctic_trt.runtime.layer import LayerShape
from arctic_trt.runtime.native.kernels import KINDS
from arctic_trt.runtime.packing import Packed
from arctic_trt.runtime.weights import LayerWeights

NORMS = ("input_norm", "post_norm", "residual_norm")
PROJECTIONS = ("qkv", "dense", "router", "expert_fc", "expert_proj", "residual_fc", "residual_proj")
SIZES = ("hidden", "heads", "kv_heads", "head_dim", "top_k", "first_expert", "experts")


class CProjection(ctypes.Structure):
    """``struct projection`` of layer.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data",)),
        *((name, ctypes.c_long) for name in ("kind", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("scale", "alpha")),
    )


class CLayer(ctypes.Structure):
    """``struct layer`` of layer.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in NORMS),
        *((name, CProjection) for name in PROJECTIONS),
        ("kv_scale", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in SIZES),
        ("eps", ctypes.c_float),
    )


class NativeLayer:
    """See :class:`arctic_trt.runtime.layer.Layer`."""

    def __init__(self, library: ctypes.CDLL, weights: LayerWeights, shape: LayerShape) -> None:
        self._lib = library
        self._weights = weights  # the structure has but their addresses
        projections = {name: getattr(weights, name) for name in PROJECTIONS if name != "router"}
        self._layer = CLayer(
            *(getattr(weights, name).data_ptr() for name in NORMS),
            *(_projection(projections.get(name, Projection(weights.router))) for name in PROJECTIONS),
            _address(weights.kv_scale),
            *(len(weights.input_norm), shape.heads, shape.kv_heads, shape.head_dim, shape.top_k, shape.first_expert),
            *(len(weights.expert_proj.weight), shape.eps),
        )
        self._at = ctypes.addressof(self._layer)

    def attention(self, x_TD: Tensor, packed: Packed, pages: Tensor) -> Tensor:
        y_TD, tables = torch.empty(x_TD.shape), packed.tables
        self._lib.attention_part(
            *(self._at, x_TD.data_ptr(), len(x_TD), packed.cos.data_ptr(), packed.sin.data_ptr(), packed.slot_T.data_ptr()),
            *(tables.start_C.data_ptr(), tables.count_C.data_ptr(), tables.block_CM.data_ptr(), *tables.block_CM.shape),
            *(pages.data_ptr(), KINDS[pages.dtype], pages.shape[3], y_TD.data_ptr()),
        )
        return y_TD

    def mlp(self, x_TD: Tensor, sum_TD: Tensor) -> Tensor:
        y_TD = torch.empty(x_TD.shape)
        self._lib.mlp_part(self._at, x_TD.data_ptr(), sum_TD.data_ptr(), len(x_TD), y_TD.data_ptr())
        return y_TD


def _projection(projection: Projection) -> CProjection:
    weight = projection.weight
    scales = (_address(projection.input_scale), _address(projection.alpha))
    return CProjection(weight.data_ptr(), KINDS[weight.dtype], *weight.shape[-2:], *scales)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
