"""The kernels of a step on the CPU, in C: e4m3 weights are multiplied as the engine file holds them, without a copy.

Products are added up in float32, in an order that depends on nothing but the length of the sum: a sequence computes the same bits
alone and in company. Inputs of an FP8 projection are rounded as :class:`arctic_trt.runtime.kernels.CpuKernels` rounds them.

Legend: T tokens, D hidden, F ffn, E experts, N query heads, K KV heads, H head dim.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from arctic_trt.model.layer import Routing
from arctic_trt.runtime.kernels import Projection, Tables
from arctic_trt.runtime.native.library import load

KINDS = {torch.float8_e4m3fn: 0, torch.bfloat16: 1, torch.float32: 2}


class NativeKernels:
    """See :class:`arctic_trt.runtime.kernels.Kernels`; make one with :func:`arctic_trt.runtime.native.choose.choose_kernels`."""

    def __init__(self, threads: int, library: ctypes.CDLL | None = None) -> None:
        """Raises :class:`NotCompiledError` where no ``library`` is given, there is none and none can be made."""
        self.library = library or load()
        self.library.set_threads(threads)

    def hold(self, weight: Tensor) -> Tensor:
        return weight

    def embed(self, rows_VD: Tensor, index_T: Tensor) -> Tensor:
        return rows_VD.index_select(0, index_T).float()

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_TD, y_TD = x_TD.contiguous(), torch.empty(x_TD.shape)
        self.library.rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr(), *x_TD.shape, eps)
        return y_TD

    def rotate(self, qkv_TNH: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
        tokens, all_heads, size = qkv_TNH.shape
        self.library.rotary(qkv_TNH.data_ptr(), cos.data_ptr(), sin.data_ptr(), tokens, heads, all_heads * size, size)

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int) -> Routing:
        routing = Routing(torch.empty(len(x_TD), top_k, dtype=torch.int64), torch.empty(len(x_TD), top_k))
        sizes = (*router_ED.shape, top_k)
        self.library.route(
            *(x_TD.data_ptr(), len(x_TD), router_ED.data_ptr(), KINDS[router_ED.dtype], *sizes),
            *(routing.chosen_TK.data_ptr(), routing.share_TK.data_ptr()),
        )
        return routing

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        x, rows = x.contiguous(), projection.weight.shape[0]
        y = torch.empty(len(x), rows)
        weight, kind, *scales = _pointers(projection)
        self.library.project(x.data_ptr(), len(x), weight, kind, rows, x.shape[1], *scales, y.data_ptr())
        return y

    def partial_sum(self, x: Tensor, projection: Projection) -> Tensor:
        return self.linear(x, projection)

    def gated_mlp(self, x_TD: Tensor, fc: Projection, proj: Projection) -> Tensor:
        y_TD = torch.empty(len(x_TD), proj.weight.shape[0])
        sizes = (*x_TD.shape, proj.weight.shape[1])
        self.library.gated_mlp(x_TD.data_ptr(), *sizes, *_pointers(fc), *_pointers(proj), y_TD.data_ptr())
        return y_TD

    def experts(self, x_TD: Tensor, routing: Routing, fc: Projection, proj: Projection, first_expert: int) -> Tensor:
        y_TD = torch.zeros(x_TD.shape)
        held, _, ffn = proj.weight.shape
        chosen = (routing.chosen_TK.data_ptr(), routing.share_TK.data_ptr(), routing.chosen_TK.shape[1])
        self.library.experts(
            *(x_TD.data_ptr(), *x_TD.shape, ffn, *chosen, first_expert, held),
            *(*_pointers(fc), *_pointers(proj), y_TD.data_ptr()),
        )
        return y_TD

    def store_kv(self, k_TKH: Tensor, v_TKH: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None) -> None:
        _, _, heads, positions, size = pages.shape
        self.library.store_kv(
            *(k_TKH.data_ptr(), v_TKH.data_ptr(), pages.data_ptr(), slot_T.data_ptr(), len(slot_T)),
            *(heads, positions, size, k_TKH.stride(0), KINDS[pages.dtype], _pointer(scale)),
        )

    def attention(self, q_TNH: Tensor, pages: Tensor, tables: Tables, scale: Tensor | None) -> Tensor:
        tokens, heads, size = q_TNH.shape
        _, _, kv_heads, positions, _ = pages.shape
        out = torch.empty(tokens, heads * size)
        where = (tables.start_C.data_ptr(), tables.count_C.data_ptr(), tables.block_CM.data_ptr(), *tables.block_CM.shape)
        self.library.attend(
            *(q_TNH.data_ptr(), pages.data_ptr(), KINDS[pages.dtype], heads, kv_heads, positions, size),
            *(*where, q_TNH.stride(0), _pointer(scale), out.data_ptr()),
        )
        return out

    def read_bandwidth_probe(self, data: Tensor) -> int:
        """Read all of ``data``, with all threads; what is returned depends on every byte."""
        return int(self.library.read_memory(data.data_ptr(), data.nbytes))


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _pointers(projection: Projection) -> tuple[int, int, int | None, int | None]:
    """Weight, its kind, input scale and alpha as the library takes them."""
    weight = projection.weight
    return weight.data_ptr(), KINDS[weight.dtype], _pointer(projection.input_scale), _pointer(projection.alpha)
