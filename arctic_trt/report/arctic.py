"""What the released Arctic takes, for questions that are asked before any of its files are here."""

from __future__ import annotations

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.report.gpus import Load
from arctic_trt.report.plan import Forecast, Job, forecast, source_from_config

RELEASED = ArcticConfig(
    hidden_size=7168,
    num_hidden_layers=35,
    num_attention_heads=56,
    num_key_value_heads=8,
    intermediate_size=4864,
    num_local_experts=128,
    num_experts_per_tok=2,
    moe_layer_frequency=1,
    parallel_attn_mlp_res=True,
    use_residual=True,
    vocab_size=32000,
    max_position_embeddings=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
"""``config.json`` of snowflake-arctic-instruct."""
TP_SIZE, SAMPLES, SAMPLE_TOKENS = 8, 128, 512
LOAD = Load(max_batch_size=8, max_seq_len=RELEASED.max_position_embeddings, max_num_tokens=8192)


def forecast_released(*, workers: int, budget_bytes: int) -> Forecast:
    """The official recipe: FP8 with an FP8 cache for eight ranks, 128 samples, within ``budget_bytes`` of memory."""
    return forecast(
        source_from_config(RELEASED),
        Job(
            mapping=plan_mapping(RELEASED, tp_size=TP_SIZE),
            quant=QuantFormat(fp8=True, kv_fp8=True),
            samples=SAMPLES,
            sample_tokens=SAMPLE_TOKENS,
            batch_size=1,
            workers=workers,
            budget_bytes=budget_bytes,
        ),
        LOAD,
    )
