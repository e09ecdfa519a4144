"""The operations of a step as Triton kernels; legend as in :mod:`arctic_trt.runtime.cuda.ops`.

With ``TRITON_INTERPRET=1`` they run on the CPU, slowly, which is how they are held to their twins without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from arctic_trt.runtime.cuda.kernels import attention, choose, norm, project, route
from arctic_trt.runtime.cuda.ops import PAIR_SLOTS, AttentionRows, NormOutput, Routed, plan_blocks
from arctic_trt.runtime.kernels import Projection

ROUTER_PARTS = 8
COMBINE_BLOCK = 1024
EMBED_BLOCK = 1024
CHOOSE_BLOCK = 4096
SMALLEST = 16
"""Rows of a matrix that tensor cores take at least."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of :func:`project_kernel` works on, and with how many warps and stages."""

    rows: int
    columns: int
    length: int
    warps: int = 4
    stages: int = 4


def plan_tile(rows: int, gated: bool) -> Tile:
    """Few rows wait for the weights and want many programs; many rows want large tiles."""
    if rows <= SMALLEST:
        return Tile(SMALLEST, 16, 256)
    if rows <= 64:
        return Tile(triton.next_power_of_2(rows), 32, 128)
    return Tile(128, 64 if gated else 128, 128, warps=8, stages=3)


class TritonOps:
    """See :class:`arctic_trt.runtime.cuda.ops.FusedOps`."""

    def embed(self, token_T: Tensor, chosen_K: Tensor, rows_VD: Tensor, first: int) -> Tensor:
        (held, hidden), tokens = rows_VD.shape, len(token_T)
        x_TD = torch.empty(tokens, hidden, device=rows_VD.device)
        grid = (tokens, triton.cdiv(hidden, EMBED_BLOCK))
        choose.embed_kernel[grid](token_T, chosen_K, rows_VD, x_TD, first, held, hidden, BLOCK=EMBED_BLOCK)
        return x_TD

    def choose(self, logits_WV: Tensor, row_K: Tensor, choice_KF: Tensor, token_K: Tensor) -> None:
        vocab = logits_WV.shape[1]
        weight_KV = torch.empty(len(row_K), vocab, device=logits_WV.device)
        choose.choose_kernel[(len(row_K),)](
            *(logits_WV, row_K, choice_KF, weight_KV, token_K, vocab, logits_WV.stride(0)),
            BLOCK=min(CHOOSE_BLOCK, triton.next_power_of_2(vocab)),
            num_warps=16,
        )

    def norm(self, x_TD: Tensor, partial_TD: Tensor | None, outputs: Sequence[NormOutput], eps: float) -> list[Tensor]:
        tokens, hidden = x_TD.shape
        sum_TD = x_TD if partial_TD is None else torch.empty_like(x_TD)
        normed = [torch.empty(x_TD.shape, dtype=_dtype(output.reader), device=x_TD.device) for output in outputs]
        padded = [*zip(outputs, normed, strict=True)] + [(outputs[0], normed[0])] * (3 - len(outputs))
        arguments = [(output.weight, _scale(output.reader, x_TD), out) for output, out in padded]
        norm.norm_kernel[(tokens,)](
            *(x_TD, x_TD if partial_TD is None else partial_TD, sum_TD),
            *(argument for output in arguments for argument in output),
            *(hidden, eps),
            ADD=partial_TD is not None,
            OUTPUTS=len(outputs),
            **{f"FP8_{place}": _is_fp8(output.reader) for place, (output, _) in enumerate(padded)},
            BLOCK=triton.next_power_of_2(hidden),
            num_warps=8,
        )
        return [sum_TD, *normed]

    def project(self, x: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
        y = torch.empty(len(x), projection.weight.shape[0], dtype=dtype, device=x.device)
        _launch(x, projection, y, len(x), project.NONE.value, None)
        return y

    def gated(self, x: Tensor, fc: Projection, proj: Projection) -> Tensor:
        y = torch.empty(len(x), fc.weight.shape[0] // 2, dtype=_dtype(proj), device=x.device)
        _launch(x, fc, y, len(x), project.FIRST_HALF.value, proj)
        return y

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        (tokens, hidden), num_experts, device = x_TD.shape, len(router_ED), x_TD.device
        logits = torch.empty(ROUTER_PARTS, tokens, num_experts, device=device)
        span = -(-hidden // ROUTER_PARTS // 64) * 64
        tile = {"BM": SMALLEST if tokens <= SMALLEST else 64, "BN": 16, "BK": 64}
        grid = (triton.cdiv(num_experts, tile["BN"]), triton.cdiv(tokens, tile["BM"]), ROUTER_PARTS)
        route.logits_kernel[grid](x_TD, router_ED, logits, tokens, num_experts, hidden, span, **tile)
        expert_S = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
        share_S = torch.empty(tokens * top_k, device=device)
        route.route_kernel[(tokens,)](
            *(logits, expert_S, share_S, num_experts, experts.start, len(experts)),
            TOP_K=top_k,
            PARTS=ROUTER_PARTS,
            BLOCK=triton.next_power_of_2(num_experts),
            num_warps=1,
        )
        if len(expert_S) <= PAIR_SLOTS:
            return Routed(expert_S, share_S, top_k)
        block = _expert_block(len(expert_S), len(experts))
        return Routed(expert_S, share_S, top_k, *plan_blocks(expert_S, len(experts), block), block)

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        slots = len(routed.expert_S)
        y = torch.empty(slots, fc.weight.shape[1] // 2, dtype=_dtype(proj), device=x.device)
        _launch(x, fc, y, slots, project.SECOND_HALF.value, proj, routed, routed.top_k)
        return y

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        y = torch.empty(len(inner), proj.weight.shape[1], device=inner.device)
        _launch(inner, proj, y, len(inner), project.NONE.value, None, routed, 1, routed.share_S)
        return y

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        out_TD, (tokens, hidden) = torch.empty_like(y_TD), y_TD.shape
        grid = (tokens, triton.cdiv(hidden, COMBINE_BLOCK))
        norm.combine_kernel[grid](y_TD, slots_SD, routed.expert_S, out_TD, hidden, TOP_K=routed.top_k, BLOCK=COMBINE_BLOCK)
        return out_TD

    def rotate_and_store(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor], position_T: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None
    ) -> Tensor:
        _, _, kv_heads, page, size = pages.shape
        heads = qkv.shape[1] // size - 2 * kv_heads
        q_TNH = torch.empty(len(qkv), heads, size, dtype=torch.bfloat16, device=qkv.device)
        attention.rotate_and_store_kernel[(len(qkv), heads + 2 * kv_heads)](
            *(qkv, *rotary, position_T, pages, slot_T, qkv if scale is None else scale, q_TNH),
            **{"HEADS": heads, "KV_HEADS": kv_heads, "SIZE": size, "PAGE": page, "FP8": scale is not None},
            HALF=triton.next_power_of_2(size // 2),
            num_warps=1,
        )
        return q_TNH

    def attend(self, q_TNH: Tensor, pages: Tensor, rows: AttentionRows, scale: Tensor | None, reader: Projection) -> Tensor:
        tokens, heads, size = q_TNH.shape
        kv_heads, page, splits, tables = pages.shape[2], pages.shape[3], rows.splits, rows.tables
        sums = torch.empty(splits, tokens, heads, size, device=q_TNH.device)
        largest, total = (torch.empty(splits, tokens, heads, device=q_TNH.device) for _ in range(2))
        head_block = max(SMALLEST, triton.next_power_of_2(size))
        attention.attend_kernel[(len(rows.chunk_R), kv_heads, splits)](
            *(q_TNH, pages, q_TNH if scale is None else scale, tables.start_C, tables.count_C, rows.first_C, tables.block_CM),
            *(rows.chunk_R, rows.offset_R, sums, largest, total, tokens, tables.block_CM.shape[1], size**-0.5),
            **{"HEADS": heads, "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "SIZE": size, "PAGE": page},
            **{"FP8": scale is not None, "ROW_TOKENS": rows.tokens, "SPLITS": splits, "BLOCK_L": 64, "BLOCK_H": head_block},
            BLOCK_M=max(SMALLEST, triton.next_power_of_2(rows.tokens * (heads // kv_heads))),
        )
        y = torch.empty(tokens, heads * size, dtype=_dtype(reader), device=q_TNH.device)
        attention.merge_kernel[(tokens, heads)](
            *(sums, largest, total, _scale(reader, sums), y, tokens),
            **{"HEADS": heads, "SIZE": size, "SPLITS": splits, "FP8_OUT": _is_fp8(reader), "BLOCK_H": head_block},
            num_warps=1,
        )
        return y


def _launch(
    x: Tensor,
    projection: Projection,
    y: Tensor,
    rows: int,
    gated: int,
    reader: Projection | None,
    routed: Routed | None = None,
    top_k: int = 0,
    share_S: Tensor | None = None,
) -> None:
    columns, length = y.shape[1], x.shape[1]
    tile = plan_tile(rows if routed is None else routed.block, bool(gated))
    blocks = triton.cdiv(rows, tile.rows) if routed is None else _blocks(routed)
    dummy: Any = y
    project.project_kernel[(triton.cdiv(columns, tile.columns), blocks)](
        *(x, projection.weight, dummy if projection.alpha is None else projection.alpha, y, _scale(reader, y)),
        dummy if routed is None or routed.slot_B is None else routed.slot_B,
        dummy if routed is None else (routed.expert_S if routed.expert_R is None else routed.expert_R),
        *(dummy if share_S is None else share_S, rows, columns, length),
        TOP_K=top_k,
        SORTED=routed is not None and routed.slot_B is not None,
        GATED=gated,
        HAS_ALPHA=projection.alpha is not None,
        HAS_SHARE=share_S is not None,
        FP8_OUT=reader is not None and _is_fp8(reader),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.length,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _expert_block(slots: int, experts: int) -> int:
    """Rows of a block: about what an expert gets, within what tensor cores take."""
    return min(128, max(SMALLEST, int(triton.next_power_of_2(slots // experts))))


def _blocks(routed: Routed) -> int:
    return len(routed.expert_S if routed.expert_R is None else routed.expert_R)


def _dtype(reader: Projection | None) -> torch.dtype:
    if reader is None:
        return torch.float32
    return torch.float8_e4m3fn if _is_fp8(reader) else torch.bfloat16


def _is_fp8(reader: Projection | None) -> bool:
    return reader is not None and reader.input_scale is not None


def _scale(reader: Projection | None, unused: Tensor) -> Tensor:
    return unused if reader is None or reader.input_scale is None else reader.input_scale
