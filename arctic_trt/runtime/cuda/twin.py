"""The operations of a step on a GPU in plain torch: what the kernels must compute, on any device and at any speed.

Products are summed in float64, in which those of e4m3 codes are exact, so that what is rounded afterwards does not depend on an
order of summation. Legend as in :mod:`arctic_trt.runtime.cuda.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model import layer
from arctic_trt.quantize.fp8 import cast_e4m3
from arctic_trt.runtime.cuda.choose import choose_row
from arctic_trt.runtime.cuda.ops import AttentionRows, NormOutput, Routed
from arctic_trt.runtime.kernels import Projection, as_bytes, attend
from arctic_trt.runtime.step import Choice


class TwinOps:
    """See :class:`arctic_trt.runtime.cuda.ops.FusedOps`; float32 ``queries`` are rounded nowhere, as on the CPU."""

    def __init__(self, queries: torch.dtype = torch.bfloat16) -> None:
        self._queries = queries

    def embed(self, token_T: Tensor, chosen_K: Tensor, rows_VD: Tensor, first: int) -> Tensor:
        known_T = torch.where(token_T < 0, chosen_K[(-1 - token_T).clamp(min=0).long()], token_T)
        local_T = known_T - first
        mine_T = (local_T >= 0) & (local_T < len(rows_VD))
        return rows_VD[local_T.where(mine_T, 0).long()].float() * mine_T[:, None]

    def choose(self, logits_WV: Tensor, row_K: Tensor, choice_KF: Tensor, token_K: Tensor) -> None:
        choices = [Choice._make(fields) for fields in choice_KF.tolist()]
        for place, (row, choice) in enumerate(zip(row_K.tolist(), choices, strict=True)):
            token_K[place] = choose_row(logits_WV[row], choice)

    def norm(self, x_TD: Tensor, partial_TD: Tensor | None, outputs: Sequence[NormOutput], eps: float) -> list[Tensor]:
        sum_TD = x_TD if partial_TD is None else x_TD + partial_TD.float()
        normed = [(layer.rms_norm(sum_TD, output.weight, eps), output.reader) for output in outputs]
        return [sum_TD, *(each if reader is None else activation(each, reader) for each, reader in normed)]

    def project(self, x: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
        return _multiply(x, projection.weight, projection.alpha).to(dtype)

    def gated(self, x: Tensor, fc: Projection, proj: Projection) -> Tensor:
        activated, linear = _multiply(x, fc.weight, fc.alpha).float().chunk(2, -1)
        return activation(F.silu(activated) * linear, proj)

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        return Routed(*slots_of(layer.route(x_TD, router_ED.float(), top_k), experts), top_k)

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        token_S = torch.arange(len(routed.expert_S), device=x.device) // routed.top_k
        linear, activated = _by_expert(_rows(x, token_S), routed, fc).float().chunk(2, -1)
        return activation(F.silu(activated) * linear, proj)

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        return (_by_expert(inner, routed, proj) * routed.share_S[:, None]).float()

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        held_SD = slots_SD.where(routed.expert_S[:, None] >= 0, 0)
        return (y_TD.float() + held_SD.view(len(y_TD), routed.top_k, -1).sum(1)).to(y_TD.dtype)

    def project_and_combine(
        self, x: Tensor, projection: Projection, slots_SD: Tensor, routed: Routed, dtype: torch.dtype
    ) -> Tensor:
        return self.combine(self.project(x, projection, dtype), slots_SD, routed)

    def attend(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        position_T: Tensor,
        pages: Tensor,
        slot_T: Tensor,
        rows: AttentionRows,
        scale: Tensor | None,
        reader: Projection,
    ) -> Tensor:
        q_TNH = self._rotate_and_store(qkv, rotary, position_T, pages, slot_T, scale)
        outputs, tables = torch.empty(len(q_TNH), q_TNH[0].numel(), device=q_TNH.device), rows.tables
        for chunk, (first, start, count) in enumerate(
            zip(rows.first_C.tolist(), tables.start_C.tolist(), tables.count_C.tolist(), strict=True)
        ):
            if count:
                keys, values = _cached(pages, tables.block_CM[chunk], start + count, scale)
                outputs[first : first + count] = attend(q_TNH[first : first + count].float(), keys, values, start)
        return activation(outputs, reader)

    def _rotate_and_store(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor], position_T: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None
    ) -> Tensor:
        _, _, kv_heads, size, head_dim = pages.shape
        heads = qkv.view(len(qkv), -1, head_dim)
        q, k, v = heads.split([heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads], 1)
        cos, sin = (table[position_T.long()][:, None] for table in rotary)
        stored = as_bytes(pages)
        for place, x_TKH in enumerate((layer.apply_rotary(k, cos, sin), v)):
            codes = x_TKH.to(pages.dtype) if scale is None else as_bytes(cast_e4m3(x_TKH, scale))
            stored[slot_T.long() // size, place, :, slot_T.long() % size] = codes
        return layer.apply_rotary(q, cos, sin).to(self._queries)


def slots_of(routing: layer.Routing, experts: range) -> tuple[Tensor, Tensor]:
    """``expert_S`` and ``share_S`` of :class:`arctic_trt.runtime.cuda.ops.Routed`, where ``experts`` are held."""
    expert_S = routing.chosen_TK.flatten() - experts.start
    held_S = (expert_S >= 0) & (expert_S < len(experts))
    return torch.where(held_S, expert_S, -1).int(), routing.share_TK.flatten()


def activation(x: Tensor, reader: Projection) -> Tensor:
    """What ``reader`` reads of float32 ``x``: e4m3 codes, or bf16."""
    return x.bfloat16() if reader.input_scale is None else cast_e4m3(x.contiguous(), reader.input_scale)


def _multiply(x: Tensor, weight: Tensor, alpha: Tensor | None) -> Tensor:
    y = F.linear(x.double(), weight.double())
    return y if alpha is None else y * alpha


def _by_expert(x: Tensor, routed: Routed, projection: Projection) -> Tensor:
    """Float64 products of rows [S, in] with their experts' weights; zeros where none is held."""
    y = torch.zeros(len(x), projection.weight.shape[1], dtype=torch.float64, device=x.device)
    for expert in range(len(projection.weight)):
        slots = (routed.expert_S == expert).nonzero().flatten()
        if len(slots):
            alpha = None if projection.alpha is None else projection.alpha[expert]
            y[slots] = _multiply(_rows(x, slots), projection.weight[expert], alpha)
    return y


def _cached(pages: Tensor, block_M: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """Keys and values of a sequence's first ``length`` positions, float32 [2, K, L, H]."""
    used_M = block_M[: -(-length // pages.shape[3])].long()
    found = _rows(pages, used_M).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].float()
    return found if scale is None else found * scale


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a tensor of any dtype; torch does not index float8."""
    return as_bytes(x)[index].view(x.dtype)
