"""The operations of a step on a GPU: products of many rows by torch's library, everything else by Triton kernels.

Few rows wait for the weights, which a kernel of our own reads once, and rounds its sums for the next projection on the way. Many
rows wait for the tensor cores, on which a library is hard to beat; between its products small kernels do the rest. Legend as in
:mod:`arctic_trt.runtime.cuda.ops`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import Rank
from arctic_trt.runtime.cuda.between import Between, Order
from arctic_trt.runtime.cuda.ops import FusedOps, Routed
from arctic_trt.runtime.cuda.products import (
    ALIGNMENT,
    WIDEST,
    Abilities,
    Products,
    TorchProducts,
    functions_of_torch,
    plan_abilities,
)
from arctic_trt.runtime.kernels import Projection

DENSE_ROWS = 128
"""From this many rows on the library multiplies. An H200 does 412 operations of e4m3 in the time of a byte, and a row needs two
with each byte of weights: up to 206 rows the weights are what takes time. At 128 rows a library's tiles are full."""
EXPERT_ROWS = 16
"""The same for experts, in rows of each on average: 1,024 tokens where two of 128 experts are chosen. Then slots of an expert no
longer fit a block of 16, and its weights are read again. The library reads them once, but its tiles cost as many operations as
128 rows an expert: 450 GFLOP a layer of one of eight ranks, two thirds of the time of its 1.67 GB, at the peak of both."""

LAUNCHES = "ARCTIC_TRT_GPU_LAUNCHES"
"""Environment: ``auto``, or ``late`` for launches that begin when the one before is complete, should a driver need that."""
AUTO, LATE = "auto", "late"
EARLY_CAPABILITY, EARLY_TRITON = (9, 0), (3, 5)
"""The first GPUs whose launches begin early, and the first Triton whose kernels reliably wait for the one before: in development
versions of 3.4 they did not compile (https://github.com/triton-lang/triton/issues/7377)."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From how many rows on the library multiplies: of a dense product, and of an expert on average.

    Steps of up to ``recorded`` tokens may be CUDA graphs, in which experts are left to the kernels.
    """

    dense_rows: int = DENSE_ROWS
    expert_rows: int = EXPERT_ROWS
    recorded: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedRouted(Routed):
    """Slots whose experts the library multiplies, all at once; what is computed of them lies in ``order``, without shares."""

    order: Order


def plan_dense(rows: int, weight: tuple[int, ...], fp8: bool, abilities: Abilities, thresholds: Thresholds) -> bool:
    """Whether the library multiplies ``rows`` with a ``weight`` of this shape."""
    if rows < thresholds.dense_rows:
        return False
    return abilities.fp8 and not any(size % ALIGNMENT for size in weight) if fp8 else abilities.bf16


def plan_experts(
    tokens: int, top_k: int, num_experts: int, sizes: tuple[int, int], abilities: Abilities, thresholds: Thresholds
) -> bool:
    """Whether the library multiplies for ``top_k`` of all experts a token; ``sizes`` are hidden and ffn of those on this rank."""
    if tokens <= thresholds.recorded or tokens * top_k < thresholds.expert_rows * num_experts or not abilities.grouped:
        return False
    return not any(size % ALIGNMENT for size in sizes) and 2 * max(sizes) <= WIDEST


class LibraryOps:
    """See :class:`arctic_trt.runtime.cuda.ops.FusedOps`; ``few`` does those on few rows, an expert is ``ffn`` wide.

    From route on, slots that :func:`plan_experts` gives to the library stay in the order of their experts until combine.
    """

    def __init__(
        self,
        few: FusedOps,
        products: Products,
        between: Between,
        abilities: Abilities,
        *,
        ffn: int,
        thresholds: Thresholds = Thresholds(),
    ) -> None:
        self._few, self._products, self._between = few, products, between
        self._abilities, self._ffn, self._thresholds = abilities, ffn, thresholds
        self.embed, self.choose, self.norm, self.attend = few.embed, few.choose, few.norm, few.attend

    def project(self, x: Tensor, projection: Projection, dtype: torch.dtype) -> Tensor:
        if not self._multiplies(x, projection):
            return self._few.project(x, projection, dtype)
        return self._products.dense(x, projection.weight, projection.alpha, dtype)

    def gated(self, x: Tensor, fc: Projection, proj: Projection) -> Tensor:
        if not self._multiplies(x, fc):
            return self._few.gated(x, fc, proj)
        return self._between.gate(self._products.dense(x, fc.weight, fc.alpha, torch.float32), proj, None)

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        num_experts, hidden = router_ED.shape
        if not plan_experts(len(x_TD), top_k, num_experts, (hidden, self._ffn), self._abilities, self._thresholds):
            return self._few.route(x_TD, router_ED, top_k, experts)
        logits_TE = self._products.dense(x_TD, router_ED.float(), None, torch.float32)
        expert_S, share_S = self._between.choose(logits_TE, top_k, experts)
        return SortedRouted(expert_S, share_S, top_k, order=self._between.sort(expert_S, top_k, len(experts)))

    def expert_gated(self, x: Tensor, routed: Routed, fc: Projection, proj: Projection) -> Tensor:
        if not isinstance(routed, SortedRouted):
            return self._few.expert_gated(x, routed, fc, proj)
        product = self._grouped(self._between.gather(x, routed.order), routed.order, fc)
        return self._between.gate(product, proj, routed.order)

    def expert_project(self, inner: Tensor, routed: Routed, proj: Projection) -> Tensor:
        if not isinstance(routed, SortedRouted):
            return self._few.expert_project(inner, routed, proj)
        return self._grouped(inner, routed.order, proj)

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        if not isinstance(routed, SortedRouted):
            return self._few.combine(y_TD, slots_SD, routed)
        return self._between.add(y_TD, slots_SD, routed.expert_S, routed.share_S, routed.order)

    def project_and_combine(
        self, x: Tensor, projection: Projection, slots_SD: Tensor, routed: Routed, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(routed, SortedRouted) or self._multiplies(x, projection):
            return self.combine(self.project(x, projection, dtype), slots_SD, routed)
        return self._few.project_and_combine(x, projection, slots_SD, routed, dtype)

    def _multiplies(self, x: Tensor, projection: Projection) -> bool:
        fp8 = projection.alpha is not None
        return plan_dense(len(x), tuple(projection.weight.shape), fp8, self._abilities, self._thresholds)

    def _grouped(self, rows: Tensor, order: Order, projection: Projection) -> Tensor:
        alpha = projection.alpha
        scale_R = None if alpha is None else alpha.view(-1).index_select(0, order.expert_R)
        return self._products.grouped(rows, projection.weight, scale_R, order.end_E)


def plan_early(asked: str, capability: tuple[int, int], triton: str) -> bool:
    """Whether launches begin early; raises :class:`UsageError` for what :data:`LAUNCHES` may not be."""
    if asked not in (AUTO, LATE):
        raise UsageError(f"{LAUNCHES}={asked} is none of {AUTO}, {LATE}.")
    version = tuple(int(part) for part in triton.split(".")[:2])
    return asked == AUTO and capability >= EARLY_CAPABILITY and version >= EARLY_TRITON


def make_ops(config: ArcticConfig, rank: Rank, device: torch.device, thresholds: Thresholds = Thresholds()) -> FusedOps:
    """Triton's kernels and torch's library on ``rank``'s GPU; what the library lacks is told, and done without.

    Raises ImportError without Triton, :class:`UsageError` as :func:`plan_early` does.
    """
    import triton

    from arctic_trt.runtime.cuda.triton_between import TritonBetween
    from arctic_trt.runtime.cuda.triton_ops import TritonOps

    capability = torch.cuda.get_device_capability(device)
    abilities = plan_abilities(capability, functions_of_torch())
    missing = [name for name in Abilities.__slots__ if not getattr(abilities, name)]
    if missing:
        logger.warning(
            "torch %s has no library products for %s on compute capability %d.%d: steps of many tokens use Triton kernels there.",
            *(torch.__version__, " and ".join(missing), *capability),
        )
    ffn = config.intermediate_size // rank.mapping.moe_tp_size
    few = TritonOps(plan_early(os.environ.get(LAUNCHES, AUTO), capability, triton.__version__))
    return LibraryOps(few, TorchProducts(device), TritonBetween(), abilities, ffn=ffn, thresholds=thresholds)
