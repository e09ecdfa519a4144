"""What a step on a GPU is made of: operations that join as much as can be computed in one launch.

There are two makers of each, held to one another by tests: :mod:`arctic_trt.runtime.cuda.triton_ops` has kernels, and
:mod:`arctic_trt.runtime.cuda.twin` says the same in plain torch, on whatever device the tensors are.

An *activation* is what a projection reads: e4m3 codes of ``x / input_scale`` if the projection is FP8, bf16 otherwise. Partial
sums, which ranks add up, come in the dtype that the caller asks for; everything else between projections is float32.

Legend: T tokens, D hidden, F ffn, E experts held, A top_k, N query heads, K KV heads, H head dim, S slots = T * A, R blocks of
rows, C chunks, M blocks of the longest sequence, P positions a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from arctic_trt.runtime.kernels import Projection, Tables

PAIR_SLOTS = 32
"""Up to this many slots, each is a block of its own: to sort them would take longer than to read an expert twice."""


@dataclass(frozen=True, slots=True)
class NormOutput:
    """A normed copy of the input: times ``weight`` [D], as the activation of ``reader``, or in float32 for None."""

    weight: Tensor
    reader: Projection | None


@dataclass(frozen=True, slots=True)
class Routed:
    """Where each token's slots go: ``expert_S`` int32, an expert held here or -1, and ``share_S`` float32.

    Rows that one expert multiplies lie in blocks of ``block`` slots: ``slot_B`` int32 [R * block], S for none, and ``expert_R``
    int32, -1 for a block that is empty. Both are None where each slot is a block.
    """

    expert_S: Tensor
    share_S: Tensor
    top_k: int
    slot_B: Tensor | None = None
    expert_R: Tensor | None = None
    block: int = 1


class FusedOps(Protocol):
    """The operations of a step. No operation waits for the device."""

    def embed(self, token_T: Tensor, chosen_K: Tensor, rows_VD: Tensor, first: int) -> Tensor:
        """Float32 [T, D]: the rows of tokens from ``first`` on, of which ``rows_VD`` are held, and zeros for others.

        A token below 0 is ``chosen_K[-1 - token]``.
        """

    def choose(self, logits_WV: Tensor, row_K: Tensor, choice_KF: Tensor, token_K: Tensor) -> None:
        """Write into int32 ``token_K`` what is chosen of rows ``row_K``, or -1 where these are not finite.

        ``choice_KF`` float64 has the fields of :class:`arctic_trt.runtime.step.Choice`.
        """

    def norm(self, x_TD: Tensor, partial_TD: Tensor | None, outputs: Sequence[NormOutput], eps: float) -> list[Tensor]:
        """The float32 sum ``x + partial``, then its RMS-normed copies."""

    def project(self, x: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
        """Activation [T, in] to [T, out] in ``dtype``."""

    def gated(self, x: Tensor, fc: Projection, proj: Projection) -> Tensor:
        """Activation to that of ``proj``, [T, F]: silu(a) * b of the first and the second half of fc's rows."""

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        """The likeliest ``top_k`` of all experts for each token of float32 ``x_TD``; those outside ``experts`` are not held."""

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        """Activation [T, in] to that of ``proj``, [S, F]; the *second* half goes through SiLU. Rows not held are anything."""

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        """Activation [S, F] to float32 [S, D], times the slots' shares; rows not held are anything."""

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        """``y_TD`` and each token's held slots, added in float32, in the dtype of ``y_TD``."""

    def project_and_combine(
        self, x: Tensor, projection: Projection, slots_SD: Tensor, routed: Routed, dtype: torch.dtype
    ) -> Tensor:
        """What :meth:`project` and :meth:`combine` give."""

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
        """Causal attention of float32 ``qkv`` [T, (N + 2 K) H] over the cache, as the activation of ``reader``, [T, N * H].

        Queries and keys are rotated, by cosines and sines [positions, H]. Keys and values go to their places among ``pages``
        [B, 2, K, P, H], and are attended to as they are there. Queries are bf16.
        """


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """A step's tables, and how its queries are cut: block ``r`` has the tokens from ``offset_R`` on of chunk ``chunk_R``.

    It has ``tokens`` at most; ``first_C`` is the packed place of a chunk's first token. All are int32. Positions are cut into
    ``splits`` parts. ``single`` says that no chunk has more than one token.
    """

    tables: Tables
    first_C: Tensor
    chunk_R: Tensor
    offset_R: Tensor
    tokens: int
    splits: int
    single: bool


def plan_blocks(expert_S: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Sort slots into blocks of one expert each, without waiting for the device: (``slot_B``, ``expert_R``) of :class:`Routed`.

    There are as many blocks as could be needed, whatever the experts are.
    """
    slots, device = len(expert_S), expert_S.device
    held_S = torch.where(expert_S < 0, num_experts, expert_S).long()
    order_S = held_S.argsort(stable=True)
    count_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=device).scatter_add_(0, held_S, torch.ones_like(held_S))
    padded_E = (count_E + block - 1) // block * block
    padded_E[num_experts] = 0
    end_E = padded_E.cumsum(0)
    sorted_S = held_S[order_S]
    place_S = (end_E - padded_E)[sorted_S] + torch.arange(slots, device=device) - (count_E.cumsum(0) - count_E)[sorted_S]
    blocks = max_blocks(slots, num_experts, block)
    nowhere = blocks * block
    slot_B = torch.full((nowhere + 1,), slots, dtype=torch.int32, device=device)
    slot_B[torch.where(sorted_S < num_experts, place_S, nowhere)] = order_S.int()
    begin_R = torch.arange(blocks, device=device) * block
    expert_R = torch.searchsorted(end_E[:num_experts], begin_R, right=True)
    return slot_B[:nowhere], torch.where(expert_R < num_experts, expert_R, -1).int()


def max_blocks(slots: int, num_experts: int, block: int) -> int:
    """Blocks that could be needed, whatever the experts are."""
    return min(slots, num_experts) + slots // block
