"""Max calibration: the tokens pass through the original bf16 model, unquantized, and the largest magnitude at each site stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.layer import (
    EXPERT_FC,
    EXPERT_PROJ,
    DenseWeights,
    MlpWeights,
    Observe,
    Routing,
    dense_path,
    gated_mlp,
    moe_input,
    route,
)
from arctic_trt.quantize.rows import Rows
from arctic_trt.quantize.team import Team
from arctic_trt.quantize.token_pass import TokenPass


class OriginalArithmetic:
    """The layer in the operations and roundings of the Hugging Face code."""

    def __init__(self, config: ArcticConfig) -> None:
        self._config = config

    def dense(self, weights: DenseWeights, x_BTD: Tensor, observe: Observe) -> tuple[Tensor, Tensor, Routing]:
        moe_x_TD = moe_input(x_BTD, weights, self._config)
        routing = route(moe_x_TD, weights.gate, self._config.num_experts_per_tok)
        return dense_path(x_BTD, weights, self._config, observe), moe_x_TD, routing

    def expert(self, weights: MlpWeights, x_TD: Tensor, observe: Observe) -> Tensor:
        return gated_mlp(x_TD, weights, observe, EXPERT_FC, EXPERT_PROJ)


class Calibration(TokenPass[DenseWeights, MlpWeights]):
    """The calibration tokens on their way through the original; rows are bf16."""

    def __init__(
        self, batches: Sequence[Tensor], config: ArcticConfig, new_rows: Callable[[int], Rows], team: Team, device: str = "cpu"
    ) -> None:
        super().__init__(batches, OriginalArithmetic(config), config.num_experts_per_tok, new_rows, team, device)
