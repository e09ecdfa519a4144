"""Launches of products with weights: what the two kernels are told, and which of them is taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from arctic_trt.runtime.cuda.kernels import project, skinny
from arctic_trt.runtime.cuda.ops import Routed
from arctic_trt.runtime.cuda.tiles import PARTS, SMALLEST, WARPS, plan_skinny_tile, plan_tile
from arctic_trt.runtime.kernels import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """``x`` times weights, into ``y``; for one of experts ``top_k`` slots read a row of ``x``.

    ``gated`` is the half that goes through SiLU before what is left is rounded for ``reader``. ``share_S`` multiplies slots;
    ``slots_SD``, those of ``added``, are added to rows of a product of few.
    """

    x: Tensor
    projection: Projection
    y: Tensor
    gated: int = project.NONE.value
    reader: Projection | None = None
    routed: Routed | None = None
    top_k: int = 0
    share_S: Tensor | None = None
    slots_SD: Tensor | None = None
    added: Routed | None = None

    @property
    def rows(self) -> int:
        """Rows that one block of weights multiplies."""
        if self.routed is None:
            return len(self.x)
        return 1 if self.routed.slot_B is None else self.routed.block

    @property
    def blocks(self) -> int | None:
        """Blocks of slots; None for a product of all rows with the same weights."""
        return None if self.routed is None else len(_experts(self.routed))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows and columns of what comes out, and the length of what is added up."""
        return len(self.y), self.y.shape[1], self.x.shape[1]

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """What both kernels read and write, in their order; ``y`` stands for what there is not."""
        y, routed = self.y, self.routed
        experts = self.added.expert_S if self.added is not None else y if routed is None else _experts(routed)
        slots = y if routed is None or routed.slot_B is None else routed.slot_B
        alpha, share_S = self.projection.alpha, self.share_S
        return (
            *(self.x, self.projection.weight, y if alpha is None else alpha, y, scale_for(self.reader, y)),
            *(slots, experts, y if share_S is None else share_S),
        )

    @property
    def meaning(self) -> dict[str, Any]:
        """What both kernels are compiled for."""
        return {
            "TOP_K": self.top_k,
            "SORTED": self.routed is not None and self.routed.slot_B is not None,
            "GATED": self.gated,
            "HAS_ALPHA": self.projection.alpha is not None,
            "HAS_SHARE": self.share_S is not None,
            "FP8_OUT": is_fp8(self.reader),
        }


def multiply(product: Product, early: bool) -> None:
    """Launch the kernel for as many rows, which may begin ``early`` if they are few."""
    if product.rows <= SMALLEST:
        _multiply_few(product, early)
    else:
        _multiply_many(product)


def _multiply_few(product: Product, early: bool) -> None:
    (rows, columns, length), itemsize = product.sizes, product.x.element_size()
    weight_rows, blocks = columns * (2 if product.gated else 1), product.blocks or 1
    aligned = length * itemsize % 16 == 0 and product.projection.weight.data_ptr() % 16 == 0
    tile = plan_skinny_tile(product.rows, weight_rows, length, itemsize, blocks)
    skinny.skinny_kernel[(triton.cdiv(weight_rows, tile.columns), blocks)](
        *product.pointers,
        *(product.y if product.slots_SD is None else product.slots_SD, rows, columns, length),
        **product.meaning,
        ADDED=0 if product.added is None else product.added.top_k,
        PREFETCHED=early and product.routed is None and aligned,
        **{"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.length, "PARTS": PARTS},
        num_warps=WARPS,
        num_stages=tile.buffers + 1,
        **launch_options(early),
    )


def _multiply_many(product: Product) -> None:
    rows, columns, length = product.sizes
    tile = plan_tile(product.rows, bool(product.gated))
    blocks = triton.cdiv(rows, tile.rows) if product.blocks is None else product.blocks
    project.project_kernel[(triton.cdiv(columns, tile.columns), blocks)](
        *product.pointers,
        *(rows, columns, length),
        **product.meaning,
        **{"BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": tile.length},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def launch_options(early: bool) -> dict[str, bool]:
    """How a kernel is told whether it begins early, and its launch."""
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


def activation_dtype(reader: Projection | None) -> torch.dtype:
    """Of what ``reader`` reads; float32 for what no projection reads."""
    if reader is None:
        return torch.float32
    return torch.float8_e4m3fn if is_fp8(reader) else torch.bfloat16


def is_fp8(reader: Projection | None) -> bool:
    """Whether ``reader`` reads e4m3 codes."""
    return reader is not None and reader.input_scale is not None


def scale_for(reader: Projection | None, unused: Tensor) -> Tensor:
    """The scale of what ``reader`` reads, or ``unused`` in its place."""
    return unused if reader is None or reader.input_scale is None else reader.input_scale


def _experts(routed: Routed) -> Tensor:
    """The expert of each block."""
    return routed.expert_S if routed.expert_R is None else routed.expert_R
