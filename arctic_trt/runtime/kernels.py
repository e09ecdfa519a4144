"""The arithmetic of a step: what differs between devices, behind one small protocol.

Every device computes the same function. An FP8 projection divides its input by the static ``input_scale``, rounds it to e4m3,
multiplies by the e4m3 weights with at least float32 accumulation and scales the product by ``alpha``. Everything between
projections is float32; a projection without scales (bf16 weights) does not round its input.

Outputs of which each rank has only a part of the sum come in the precision in which the parts should be added. On the CPU that
is float64, in which sums of e4m3 products are exact: an activation then rounds to the same e4m3 code however the sum was
divided over ranks, where float32 sums would now and then round to neighbouring codes, about a tenth apart.

Legend: T tokens, D hidden, F ffn, E experts, N query heads, K KV heads, H head dim, L cached positions of a sequence, C chunks,
B blocks of the cache, P positions a block, M blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model import layer
from arctic_trt.model.layer import Routing
from arctic_trt.quantize.fp8 import cast_e4m3

DECODE_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Projection:
    """Weights [out, in], or [E, out, in] for experts, as the device holds them; scales are None for a bf16 projection.

    ``input_scale`` is [1]; ``alpha``, weight scale times activation scale, is [1] or [E, 1].
    """

    weight: Tensor
    input_scale: Tensor | None = None
    alpha: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Tables:
    """Where the chunks of a step find their sequences' keys and values; int32, chunks in packed order.

    ``start_C`` is the position of a chunk's first token, ``count_C`` the number of its tokens in this step, and ``block_CM`` the
    blocks of its sequence in the order of positions, padded with 0.
    """

    start_C: Tensor
    count_C: Tensor
    block_CM: Tensor


class Kernels(Protocol):
    """Arithmetic on one device; activations in and out are float32."""

    def hold(self, weight: Tensor) -> Tensor:
        """Bring a weight from the file (e4m3, bf16 or float32) into the form that this device multiplies."""

    def embed(self, rows_VD: Tensor, index_T: Tensor) -> Tensor:
        """Rows of a held embedding, [T, D]."""

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalised rows times ``weight_D``, [T, D]."""

    def rotate(self, qkv_TNH: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
        """Apply rotary embeddings [T, 1, H] to the first ``heads`` heads, in place."""

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int) -> Routing:
        """The likeliest ``top_k`` experts of each token, by a softmax over all, and their renormalised shares."""

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        """[T, in] to float32 [T, out]."""

    def partial_sum(self, x: Tensor, projection: Projection) -> Tensor:
        """[T, in] to [T, out] where other ranks hold other columns of the weight."""

    def gated_mlp(self, x_TD: Tensor, fc: Projection, proj: Projection) -> Tensor:
        """Partial sum of proj(silu(a) * b) where fc's first half of rows gives a and its second half gives b."""

    def experts(self, x_TD: Tensor, routing: Routing, fc: Projection, proj: Projection, first_expert: int) -> Tensor:
        """Partial sum over the chosen experts among those held, [T, D]; the *second* half of fc's rows goes through SiLU."""

    def store_kv(self, k_TKH: Tensor, v_TKH: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None) -> None:
        """Write a layer's float32 keys and values into its ``pages`` [B, 2, K, P, H], as e4m3 codes of ``x / scale`` if there is
        a ``scale`` [1].

        ``slot_T`` (int64) is block * P + offset of each token; no two tokens share one.
        """

    def attention(self, q_TNH: Tensor, pages: Tensor, tables: Tables, scale: Tensor | None) -> Tensor:
        """Causal attention over the cache, float32 [T, N * H]: token j of chunk c sees positions 0 to start_C[c] + j."""


class CpuKernels:
    """Plain torch on the CPU: e4m3 weights are held as bf16, which represents each of them exactly.

    Products are accumulated in ``accumulate``, and partial sums come in it.
    """

    def __init__(self, accumulate: torch.dtype = torch.float64) -> None:
        self._accumulate = accumulate

    def hold(self, weight: Tensor) -> Tensor:
        return decode_e4m3(weight, torch.bfloat16) if weight.dtype == torch.float8_e4m3fn else weight

    def embed(self, rows_VD: Tensor, index_T: Tensor) -> Tensor:
        return rows_VD.index_select(0, index_T).float()

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return layer.rms_norm(x_TD, weight_D, eps)

    def rotate(self, qkv_TNH: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
        qkv_TNH[:, :heads] = layer.apply_rotary(qkv_TNH[:, :heads], cos, sin)

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int) -> Routing:
        return layer.route(x_TD, router_ED, top_k)

    def linear(self, x: Tensor, projection: Projection) -> Tensor:
        return self.partial_sum(x, projection).float()

    def partial_sum(self, x: Tensor, projection: Projection) -> Tensor:
        return self._multiply(rounded(x, projection.input_scale), projection.weight, projection.alpha)

    def gated_mlp(self, x_TD: Tensor, fc: Projection, proj: Projection) -> Tensor:
        activated, linear = self.linear(x_TD, fc).chunk(2, -1)
        return self.partial_sum(F.silu(activated) * linear, proj)

    def experts(self, x_TD: Tensor, routing: Routing, fc: Projection, proj: Projection, first_expert: int) -> Tensor:
        y_TD = torch.zeros_like(x_TD, dtype=self._accumulate)
        x_TD = rounded(x_TD, fc.input_scale)
        for expert in sorted(set(routing.chosen_TK.flatten().tolist())):
            local = expert - first_expert
            if not 0 <= local < len(fc.weight):
                continue
            token, slot = routing.tokens_of(expert)
            linear, activated = self._multiply(x_TD[token], fc.weight[local], _of_expert(fc.alpha, local)).float().chunk(2, -1)
            inner = rounded(F.silu(activated) * linear, proj.input_scale)
            out = self._multiply(inner, proj.weight[local], _of_expert(proj.alpha, local))
            y_TD.index_add_(0, token, out * routing.share_TK[token, slot, None])
        return y_TD

    def store_kv(self, k_TKH: Tensor, v_TKH: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None) -> None:
        block_T, offset_T = slot_T // pages.shape[3], slot_T % pages.shape[3]
        for place, x_TKH in enumerate((k_TKH, v_TKH)):
            stored = x_TKH if scale is None else as_bytes(cast_e4m3(x_TKH, scale))
            as_bytes(pages)[block_T, place, :, offset_T] = stored

    def attention(self, q_TNH: Tensor, pages: Tensor, tables: Tables, scale: Tensor | None) -> Tensor:
        outputs, begin = [], 0
        for start, count, block_M in zip(tables.start_C.tolist(), tables.count_C.tolist(), tables.block_CM, strict=True):
            keys, values = _cached(pages, block_M, start + count, scale)
            outputs.append(attend(q_TNH[begin : begin + count], keys, values, start))
            begin += count
        return torch.cat(outputs)

    def _multiply(self, x: Tensor, weight: Tensor, alpha: Tensor | None) -> Tensor:
        """Product of ``x`` [T, in] and held ``weight`` [out, in], times ``alpha``."""
        y = F.linear(x.to(self._accumulate), weight.to(self._accumulate))
        return y if alpha is None else y * alpha


def rounded(x: Tensor, scale: Tensor | None) -> Tensor:
    """Float32 values of the e4m3 codes of ``x / scale``; ``x`` itself where there is no scale."""
    return x if scale is None else decode_e4m3(cast_e4m3(x, scale), torch.float32)


def decode_e4m3(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of e4m3 ``codes`` by table: several times faster than torch's own conversion, and untouched by denormal modes."""
    out = torch.empty(codes.shape, dtype=dtype)
    source, target, table = codes.reshape(-1).view(torch.uint8), out.view(-1), _TABLES[dtype]
    for begin in range(0, len(target), DECODE_CHUNK):
        part = slice(begin, begin + DECODE_CHUNK)
        torch.index_select(table, 0, source[part].int(), out=target[part])
    return out


def attend(q_TNH: Tensor, keys_KLH: Tensor, values_KLH: Tensor, start: int) -> Tensor:
    """Causal attention of one sequence's queries, at positions ``start`` and on, over its keys and values; [T, N * H]."""
    tokens, length = len(q_TNH), keys_KLH.shape[1]
    q, k, v = q_TNH.transpose(0, 1)[None], keys_KLH[None], values_KLH[None]
    seen = None
    if tokens > 1 and start:
        seen = torch.ones(tokens, length, dtype=torch.bool, device=q_TNH.device).tril(start)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=tokens > 1 and not start, enable_gqa=True)
    return out[0].transpose(0, 1).reshape(tokens, -1)


def as_bytes(pages: Tensor) -> Tensor:
    """E4m3 as the bytes it is, because torch does not index float8; anything else as it is."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def _cached(pages: Tensor, block_M: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """Keys and values of a sequence's first ``length`` positions, float32 [2, K, L, H]."""
    used_M = block_M[: -(-length // pages.shape[3])]
    gathered = as_bytes(pages).index_select(0, used_M).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
    return gathered if scale is None else decode_e4m3(gathered, torch.float32) * scale


def _of_expert(alpha: Tensor | None, local: int) -> Tensor | None:
    return None if alpha is None else alpha[local]


_CODES = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
_TABLES = {dtype: _CODES.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
