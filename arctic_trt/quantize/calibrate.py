"""Max calibration, one layer at a time: hidden states of all samples flow through, the largest magnitude at each site stays.

The forward pass is the original bf16 model's, unquantized, in the batches that were asked for: which matrix kernel runs
depends on the shape, and with it the last bit of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arctic_trt.errors import ArcticTrtError
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import DenseWeights, MlpWeights, Routing, add_expert, dense_path, moe_input, route
from arctic_trt.quantize.fp8 import amax


@dataclass(slots=True)
class SiteAmax:
    """Running maximum of |x| at each quantized site of one layer, in the activations' own dtype."""

    layer: int
    values: dict[str, Tensor] = field(default_factory=dict)

    def observe(self, site: str, x: Tensor) -> None:
        """Widen ``site`` by ``x``; raises :class:`ArcticTrtError` when ``x`` is not finite."""
        value = amax(x)
        if not torch.isfinite(value):
            raise ArcticTrtError(
                f"The activations at {site} of layer {self.layer} contain NaN or infinity.",
                "Check the checkpoint's weights and the calibration data.",
            )
        seen = self.values.get(site)
        self.values[site] = value if seen is None else torch.maximum(seen, value)


@dataclass(slots=True)
class _Batch:
    """What one batch keeps while a layer's experts pass by."""

    moe_x_TD: Tensor
    routing: Routing
    moe_y_TD: Tensor
    dense_BTD: Tensor


class Calibration:
    """The calibration tokens on their way through the model.

    Per layer: :meth:`enter` with the dense weights, :meth:`visit` with each expert in ascending order, :meth:`leave`.
    Between layers only the hidden states remain, tokens * hidden * 2 bytes.
    """

    def __init__(self, batches: Sequence[Tensor], embedding_VD: Tensor, config: ArcticConfig) -> None:
        self.config = config
        self.hidden: list[Tensor] = [embedding_VD[ids] for ids in batches]
        self.num_tokens = sum(ids.numel() for ids in batches)
        self._amax = SiteAmax(-1)
        self._in_flight: list[_Batch] = []

    @torch.inference_mode()
    def enter(self, layer: int, dense: DenseWeights) -> None:
        """Run attention, residual MLP and router of ``layer`` over all batches."""
        self._amax = SiteAmax(layer)
        for x_BTD in self.hidden:
            moe_x_TD = moe_input(x_BTD, dense, self.config)
            routing = route(moe_x_TD, dense.gate, self.config.num_experts_per_tok)
            dense_BTD = dense_path(x_BTD, dense, self.config, self._amax.observe)
            self._in_flight.append(_Batch(moe_x_TD, routing, torch.zeros_like(moe_x_TD), dense_BTD))

    @torch.inference_mode()
    def visit(self, expert: int, weights: MlpWeights) -> int:
        """Add one expert's output for the tokens routed to it; returns how many there were."""
        return sum(
            add_expert(batch.moe_y_TD, batch.moe_x_TD, batch.routing, expert, weights, self._amax.observe)
            for batch in self._in_flight
        )

    @torch.inference_mode()
    def leave(self) -> dict[str, Tensor]:
        """Advance the hidden states to the next layer and return the amax of every site of this one."""
        self.hidden = [batch.dense_BTD + batch.moe_y_TD.view_as(batch.dense_BTD) for batch in self._in_flight]
        self._in_flight = []
        return self._amax.values
