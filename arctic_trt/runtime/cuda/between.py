"""What lies between the products of a library: operations that a kernel of one's own would do on the way.

Like :mod:`arctic_trt.runtime.cuda.ops` there are two makers of each; the one here is in plain torch. Legend as
there, and: R rows of experts, which are slots in the order of their experts, those that are held first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from arctic_trt.model.layer import choose_experts
from arctic_trt.runtime.cuda.twin import activation, slots_of
from arctic_trt.runtime.kernels import Projection, as_bytes


@dataclass(frozen=True, slots=True)
class Order:
    """Slots by expert, int32: row r is of token ``token_R[r]`` and expert ``expert_R[r]``, slot s is row ``row_S[s]``.

    Rows of expert e end before ``end_E[e]``. Slots that are not held come last, with any expert.
    """

    token_R: Tensor
    expert_R: Tensor
    row_S: Tensor
    end_E: Tensor


class Between(Protocol):
    """Nothing here waits for the device; rows that are not held are neither read nor written, and anything."""

    def choose(self, logits_TE: Tensor, top_k: int, experts: range) -> tuple[Tensor, Tensor]:
        """``expert_S`` and ``share_S`` of :class:`arctic_trt.runtime.cuda.ops.Routed`, of float32 logits of all experts."""

    def sort(self, expert_S: Tensor, top_k: int, num_experts: int) -> Order:
        """Slots in the order of their experts, those of one expert in their own."""

    def gather(self, x: Tensor, order: Order) -> Tensor:
        """Rows of experts [S, in], of activations [T, in]."""

    def gate(self, product: Tensor, reader: Projection, order: Order | None) -> Tensor:
        """Activation of ``reader`` [R, F]: one half of ``product`` [R, 2 F], float32 or bf16, times the SiLU of the other.

        SiLU takes the first half, and the second of experts, whose rows are in ``order``.
        """

    def add(self, y_TD: Tensor, rows_SD: Tensor, expert_S: Tensor, share_S: Tensor, order: Order) -> Tensor:
        """``y_TD`` and each token's held slots times their shares, added in float32, in the dtype of ``y_TD``."""


class TwinBetween:
    """See :class:`Between`."""

    def choose(self, logits_TE: Tensor, top_k: int, experts: range) -> tuple[Tensor, Tensor]:
        return slots_of(choose_experts(logits_TE, top_k), experts)

    def sort(self, expert_S: Tensor, top_k: int, num_experts: int) -> Order:
        held_S = torch.where(expert_S < 0, num_experts, expert_S).long()
        slot_R = held_S.argsort(stable=True)
        end_E = held_S.bincount(minlength=num_experts)[:num_experts].cumsum(0)
        expert_R = held_S[slot_R].clamp(max=num_experts - 1)
        return Order((slot_R // top_k).int(), expert_R.int(), slot_R.argsort().int(), end_E.int())

    def gather(self, x: Tensor, order: Order) -> Tensor:
        return as_bytes(x)[order.token_R.long()].view(x.dtype)

    def gate(self, product: Tensor, reader: Projection, order: Order | None) -> Tensor:
        first, second = product.float().chunk(2, -1)
        activated, linear = (first, second) if order is None else (second, first)
        return activation(F.silu(activated) * linear, reader)

    def add(self, y_TD: Tensor, rows_SD: Tensor, expert_S: Tensor, share_S: Tensor, order: Order) -> Tensor:
        shared_SD = rows_SD[order.row_S.long()].float() * share_S[:, None]
        held_SD = shared_SD.where(expert_S[:, None] >= 0, 0)
        return (y_TD.float() + held_SD.view(len(y_TD), -1, y_TD.shape[1]).sum(1)).to(y_TD.dtype)
