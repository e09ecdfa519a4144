"""The operations of a step as Triton kernels; legend as in :mod:`arctic_trt.runtime.cuda.ops`.

With ``TRITON_INTERPRET=1`` they run on the CPU, slowly, which is how they are held to their twins without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from arctic_trt.runtime.cuda.kernels import attention, choose, norm, project, route
from arctic_trt.runtime.cuda.multiply import Product, activation_dtype, is_fp8, launch_options, multiply, scale_for
from arctic_trt.runtime.cuda.ops import PAIR_SLOTS, AttentionRows, NormOutput, Routed, max_blocks, plan_blocks
from arctic_trt.runtime.cuda.tiles import SMALLEST, expert_block, power_of_2
from arctic_trt.runtime.kernels import Projection

ROW_BLOCK = 1024
"""Columns of a row that a program combines."""
EMBED_BLOCK = 1024
CHOOSE_BLOCK = 4096
"""Logits that a program reads at once: with twice as many registers would not suffice."""
FEW_TOKENS = 64
"""Up to so many tokens a router's product is summed by all threads, beyond that tile by tile; a row is normed by many threads."""
PLANNED_SLOTS = 1024
"""Up to so many slots are sorted by one program."""
ARRIVALS = 4096
"""Counters of programs that have done their part of something, all 0 between launches."""


class TritonOps:
    """See :class:`arctic_trt.runtime.cuda.ops.FusedOps`.

    ``early`` launches begin while the one before still runs: they prefetch their weights, and wait before they read anything
    else (programmatic dependent launch, which GPUs have from compute capability 9.0 on). The launch after streams have met, and
    the first on a stream of its own, are never early.
    """

    def __init__(self, early: bool = False) -> None:
        self._early = early
        self._arrived: dict[str, Tensor] = {}

    def embed(self, token_T: Tensor, chosen_K: Tensor, rows_VD: Tensor, first: int) -> Tensor:
        (held, hidden), tokens = rows_VD.shape, len(token_T)
        x_TD = torch.empty(tokens, hidden, device=rows_VD.device)
        grid = (tokens, triton.cdiv(hidden, EMBED_BLOCK))
        choose.embed_kernel[grid](token_T, chosen_K, rows_VD, x_TD, first, held, hidden, BLOCK=EMBED_BLOCK)
        return x_TD

    def choose(self, logits_WV: Tensor, row_K: Tensor, choice_KF: Tensor, token_K: Tensor) -> None:
        vocab = logits_WV.shape[1]
        weight_KV = torch.empty(len(row_K), vocab, device=logits_WV.device)
        choose.choose_token_kernel[(len(row_K),)](
            *(logits_WV, row_K, choice_KF, weight_KV, token_K, vocab, logits_WV.stride(0)),
            BLOCK=min(CHOOSE_BLOCK, triton.next_power_of_2(vocab)),
            num_warps=16,
        )

    def norm(self, x_TD: Tensor, partial_TD: Tensor | None, outputs: Sequence[NormOutput], eps: float) -> list[Tensor]:
        tokens, hidden = x_TD.shape
        sum_TD = x_TD if partial_TD is None else torch.empty_like(x_TD)
        normed = [torch.empty(x_TD.shape, dtype=activation_dtype(output.reader), device=x_TD.device) for output in outputs]
        padded = [*zip(outputs, normed, strict=True)] + [(outputs[0], normed[0])] * (3 - len(outputs))
        arguments = [(output.weight, scale_for(output.reader, x_TD), out) for output, out in padded]
        norm.norm_kernel[(tokens,)](
            *(x_TD, x_TD if partial_TD is None else partial_TD, sum_TD),
            *(argument for output in arguments for argument in output),
            *(hidden, eps),
            ADD=partial_TD is not None,
            OUTPUTS=len(outputs),
            **{f"FP8_{place}": is_fp8(output.reader) for place, (output, _) in enumerate(padded)},
            BLOCK=power_of_2(hidden),
            num_warps=16 if tokens <= FEW_TOKENS else 8,
            **launch_options(self._early),
        )
        return [sum_TD, *normed]

    def project(self, x: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
        y = torch.empty(len(x), projection.weight.shape[0], dtype=dtype, device=x.device)
        multiply(Product(x=x, projection=projection, y=y), self._early)
        return y

    def gated(self, x: Tensor, fc: Projection, proj: Projection) -> Tensor:
        y = torch.empty(len(x), fc.weight.shape[0] // 2, dtype=activation_dtype(proj), device=x.device)
        multiply(Product(x=x, projection=fc, y=y, gated=project.FIRST_HALF.value, reader=proj), self._early)
        return y

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        (tokens, hidden), num_experts, device = x_TD.shape, len(router_ED), x_TD.device
        few = tokens <= FEW_TOKENS
        rows = min(8, power_of_2(tokens)) if few else 64
        columns, length, parts = (4, 256, 4) if few else (16, 64, 8)
        blocks = triton.cdiv(tokens, rows)
        logits = torch.empty(parts, tokens, num_experts, device=device)
        expert_S = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
        share_S = torch.empty(tokens * top_k, device=device)
        route.route_kernel[(triton.cdiv(num_experts, columns), blocks, parts)](
            *(x_TD, router_ED, logits, self._counters("route", blocks, device), expert_S, share_S),
            *(tokens, num_experts, hidden, triton.cdiv(hidden, parts * length) * length, experts.start, len(experts)),
            **{"TOP_K": top_k, "FEW": few, "BM": rows, "BN": columns, "BK": length, "PARTS": parts},
            STAGES=5 if few else 3,
            BLOCK_E=power_of_2(num_experts),
        )
        if len(expert_S) <= PAIR_SLOTS:
            return Routed(expert_S, share_S, top_k)
        block = expert_block(len(expert_S), num_experts)
        return Routed(expert_S, share_S, top_k, *self.plan_blocks(expert_S, len(experts), block), block)

    def plan_blocks(self, expert_S: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """See :func:`arctic_trt.runtime.cuda.ops.plan_blocks`, which plans many slots."""
        slots, device = len(expert_S), expert_S.device
        if slots > PLANNED_SLOTS:
            return plan_blocks(expert_S, num_experts, block)
        blocks = max_blocks(slots, num_experts, block)
        slot_B = torch.empty(blocks * block, dtype=torch.int32, device=device)
        expert_R = torch.empty(blocks, dtype=torch.int32, device=device)
        route.plan_kernel[(1,)](
            *(expert_S, slot_B, expert_R, slots, blocks, num_experts),
            **{"BLOCK": block, "CHUNK": 64, "EXPERTS": power_of_2(num_experts), "BLOCKS": power_of_2(blocks)},
            num_warps=8,
            **launch_options(self._early),
        )
        return slot_B, expert_R

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        y = torch.empty(len(routed.expert_S), fc.weight.shape[1] // 2, dtype=activation_dtype(proj), device=x.device)
        half = project.SECOND_HALF.value
        multiply(Product(x=x, projection=fc, y=y, gated=half, reader=proj, routed=routed, top_k=routed.top_k), self._early)
        return y

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        y = torch.empty(len(inner), proj.weight.shape[1], device=inner.device)
        multiply(Product(x=inner, projection=proj, y=y, routed=routed, top_k=1, share_S=routed.share_S), self._early)
        return y

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        out_TD, (tokens, hidden) = torch.empty_like(y_TD), y_TD.shape
        grid = (tokens, triton.cdiv(hidden, ROW_BLOCK))
        norm.combine_kernel[grid](y_TD, slots_SD, routed.expert_S, out_TD, hidden, TOP_K=routed.top_k, BLOCK=ROW_BLOCK)
        return out_TD

    def project_and_combine(
        self, x: Tensor, projection: Projection, slots_SD: Tensor, routed: Routed, dtype: torch.dtype
    ) -> Tensor:
        if len(x) > SMALLEST:
            return self.combine(self.project(x, projection, dtype), slots_SD, routed)
        y = torch.empty(len(x), projection.weight.shape[0], dtype=dtype, device=x.device)
        multiply(Product(x=x, projection=projection, y=y, slots_SD=slots_SD, added=routed), early=False)
        return y

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
        _, _, kv_heads, page, size = pages.shape
        tokens, splits, tables, device = len(qkv), rows.splits, rows.tables, qkv.device
        heads = qkv.shape[1] // size - 2 * kv_heads
        read = qkv if rows.single else _rotate_and_store(qkv, rotary, position_T, pages, slot_T, scale)
        sums = torch.empty(splits, tokens, heads, size, device=device)
        largest, total = (torch.empty(splits, tokens, heads, device=device) for _ in range(2))
        arrived = self._counters("attend", len(rows.chunk_R) * kv_heads if splits > 1 else 0, device)
        y = torch.empty(tokens, heads * size, dtype=activation_dtype(reader), device=device)
        attention.attend_kernel[(len(rows.chunk_R), kv_heads, splits)](
            *(read, *rotary, position_T, slot_T, pages, qkv if scale is None else scale, tables.start_C, tables.count_C),
            *(
                rows.first_C,
                tables.block_CM,
                rows.chunk_R,
                rows.offset_R,
                sums,
                largest,
                total,
                arrived,
                scale_for(reader, qkv),
                y,
            ),
            *(tokens, tables.block_CM.shape[1], size**-0.5),
            **{"HEADS": heads, "KV_HEADS": kv_heads, "GROUP": heads // kv_heads, "SIZE": size, "PAGE": page},
            **{"SINGLE": rows.single, "FP8": scale is not None, "FP8_OUT": is_fp8(reader), "ROW_TOKENS": rows.tokens},
            **{"SPLITS": splits, "BLOCK_L": 64, "BLOCK_H": max(SMALLEST, power_of_2(size))},
            BLOCK_M=max(SMALLEST, power_of_2(rows.tokens * (heads // kv_heads))),
            **launch_options(self._early),
        )
        return y

    def _counters(self, name: str, count: int, device: torch.device) -> Tensor:
        """At least ``count`` zeros, which stay where they are because recorded launches know the place."""
        if count > ARRIVALS:
            raise ValueError(f"a launch cut into {count} groups of programs; there are counters for {ARRIVALS}")
        if name not in self._arrived:
            self._arrived[name] = torch.zeros(ARRIVALS, dtype=torch.int32, device=device)
        return self._arrived[name]


def _rotate_and_store(
    qkv: Tensor, rotary: tuple[Tensor, Tensor], position_T: Tensor, pages: Tensor, slot_T: Tensor, scale: Tensor | None
) -> Tensor:
    """Rotated queries, bf16 [T, N, H]; keys and values go to ``pages``."""
    _, _, kv_heads, page, size = pages.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    q_TNH = torch.empty(len(qkv), heads, size, dtype=torch.bfloat16, device=qkv.device)
    attention.rotate_and_store_kernel[(len(qkv), heads + 2 * kv_heads)](
        *(qkv, *rotary, position_T, pages, slot_T, qkv if scale is None else scale, q_TNH),
        **{"HEADS": heads, "KV_HEADS": kv_heads, "SIZE": size, "PAGE": page, "FP8": scale is not None},
        HALF=power_of_2(size // 2),
        num_warps=1,
    )
    return q_TNH
