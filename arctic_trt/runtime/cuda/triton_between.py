"""What lies between the products of a library, as Triton kernels; see :mod:`arctic_trt.runtime.cuda.between`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from arctic_trt.runtime.cuda.between import Order
from arctic_trt.runtime.cuda.kernels import between
from arctic_trt.runtime.cuda.tiles import power_of_2
from arctic_trt.runtime.kernels import Projection

CHOOSE_BLOCK = 8
"""Tokens that a program chooses experts for."""
SORT_BLOCK, SORT_PART = 64, 16
"""Slots, and blocks of them, that a program of sorting looks at together."""
ROW_BLOCK = 1024
"""Columns that a program takes of a row."""


class TritonBetween:
    """See :class:`arctic_trt.runtime.cuda.between.Between`."""

    def choose(self, logits_TE: Tensor, top_k: int, experts: range) -> tuple[Tensor, Tensor]:
        tokens, num_experts = logits_TE.shape
        expert_S = torch.empty(tokens * top_k, dtype=torch.int32, device=logits_TE.device)
        share_S = torch.empty(tokens * top_k, device=logits_TE.device)
        between.choose_kernel[(triton.cdiv(tokens, CHOOSE_BLOCK),)](
            *(logits_TE, expert_S, share_S, tokens, num_experts, experts.start, len(experts)),
            **{"TOP_K": top_k, "BM": CHOOSE_BLOCK, "BLOCK_E": power_of_2(num_experts)},
        )
        return expert_S, share_S

    def sort(self, expert_S: Tensor, top_k: int, num_experts: int) -> Order:
        slots, device = len(expert_S), expert_S.device
        blocks, padded = triton.cdiv(slots, SORT_BLOCK), power_of_2(num_experts)
        count = torch.empty(blocks, padded, dtype=torch.int32, device=device)
        token_R, expert_R, row_S = (torch.empty(slots, dtype=torch.int32, device=device) for _ in range(3))
        end_E = torch.empty(num_experts, dtype=torch.int32, device=device)
        between.count_kernel[(blocks,)](expert_S, count, slots, BLOCK=SORT_BLOCK, EXPERTS=padded)
        between.place_kernel[(blocks,)](
            *(expert_S, count, token_R, expert_R, row_S, end_E, slots, num_experts, blocks),
            **{"TOP_K": top_k, "BLOCK": SORT_BLOCK, "EXPERTS": padded, "PART": SORT_PART},
        )
        return Order(token_R, expert_R, row_S, end_E)

    def gather(self, x: Tensor, order: Order) -> Tensor:
        rows = torch.empty(len(order.token_R), x.shape[1], dtype=x.dtype, device=x.device)
        length = x.shape[1] * x.element_size()
        between.gather_kernel[(len(rows),)](
            *(x.view(torch.uint8), order.token_R, order.end_E[-1:], rows.view(torch.uint8), length),
            BLOCK=power_of_2(length),
        )
        return rows

    def gate(self, product: Tensor, reader: Projection, order: Order | None) -> Tensor:
        (rows, both), scale = product.shape, reader.input_scale
        dtype = torch.bfloat16 if scale is None else torch.float8_e4m3fn
        y = torch.empty(rows, both // 2, dtype=dtype, device=product.device)
        between.gate_kernel[(rows, triton.cdiv(both // 2, ROW_BLOCK))](
            *(product, product if scale is None else scale, y, y if order is None else order.end_E[-1:], both // 2),
            **{"EXPERTS": order is not None, "FP8_OUT": scale is not None, "BLOCK": ROW_BLOCK},
        )
        return y

    def add(self, y_TD: Tensor, rows_SD: Tensor, expert_S: Tensor, share_S: Tensor, order: Order) -> Tensor:
        out_TD, (tokens, hidden) = torch.empty_like(y_TD), y_TD.shape
        between.add_kernel[(tokens, triton.cdiv(hidden, ROW_BLOCK))](
            *(y_TD, rows_SD, expert_S, share_S, order.row_S, out_TD, hidden),
            **{"TOP_K": len(expert_S) // tokens, "BLOCK": ROW_BLOCK},
        )
        return out_TD
