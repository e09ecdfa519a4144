"""The flags of ``trtllm-build`` that are not plugins. Source: ``tensorrt_llm/commands/build.py`` of 1.0.0, 1.1.0 and 1.2.1."""

from __future__ import annotations

import argparse
from typing import Any

from tensorrt_llm.builder import DEFAULTS
from tensorrt_llm.kv_cache_type import KVCacheType
from tensorrt_llm.logger import severity_map
from tensorrt_llm.play import HAS_AUTO_PARALLEL

LORA_MODULES = (
    *("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate", "cross_attn_qkv"),
    *("cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense", "moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router"),
    *("mlp_router", "mlp_gate_up"),
)
CLUSTERS = (
    *(
        "A100-SXM-80GB",
        "A100-SXM-40GB",
        "A100-PCIe-80GB",
        "A100-PCIe-40GB",
        "H100-SXM",
        "H100-PCIe",
        "H20",
        "H200-SXM",
        "H200-NVL",
    ),
    *("A40", "A30", "A10", "A10G", "L40S", "L40", "L20", "L4", "L2"),
)
SPECULATIVE = ("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle")

TEXTS: dict[str, str | None] = {
    "checkpoint_dir": None,
    "model_config": None,
    "build_config": None,
    "model_cls_file": None,
    "model_cls_name": None,
    "output_dir": "engine_outputs",
    "input_timing_cache": DEFAULTS["input_timing_cache"],
    "output_timing_cache": DEFAULTS["output_timing_cache"],
    "visualize_network": None,
}
NUMBERS: dict[tuple[str, ...], int | None] = {
    ("max_batch_size",): DEFAULTS["max_batch_size"],
    ("max_input_len",): DEFAULTS["max_input_len"],
    ("max_seq_len", "max_decoder_seq_len"): DEFAULTS["max_seq_len"],
    ("max_beam_width",): DEFAULTS["max_beam_width"],
    ("max_num_tokens",): DEFAULTS["max_num_tokens"],
    ("opt_num_tokens",): DEFAULTS["opt_num_tokens"],
    ("max_encoder_input_len",): DEFAULTS["max_encoder_input_len"],
    ("max_prompt_embedding_table_size", "max_multimodal_len"): DEFAULTS["max_prompt_embedding_table_size"],
    ("workers",): 1,
    ("max_lora_rank",): 64,
    ("max_draft_len",): 0,
    **({("auto_parallel",): 1, ("gpus_per_node",): 8} if HAS_AUTO_PARALLEL else {}),
}
SWITCHES = (
    *("strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run", "monitor_memory"),
    *("gather_context_logits", "gather_generation_logits", "gather_all_token_logits"),
)
CHOICES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "profiling_verbosity": (DEFAULTS["profiling_verbosity"], ("layer_names_only", "detailed", "none")),
    "log_level": ("info", tuple(severity_map)),
    "logits_dtype": (None, ("float16", "float32")),
    "lora_ckpt_source": ("hf", ("hf", "nemo")),
    "speculative_decoding_mode": (None, SPECULATIVE),
    **({"cluster_key": (None, CLUSTERS)} if HAS_AUTO_PARALLEL else {}),
}
"""Default and choices."""


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them all; ``--kv_cache_type`` and ``--paged_kv_cache`` appear in the namespace only when given."""
    for name, text in TEXTS.items():
        parser.add_argument(f"--{name}", type=str, default=text)
    for names, number in NUMBERS.items():
        parser.add_argument(*(f"--{name}" for name in names), type=int, default=number, dest=names[0])
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true", default=False)
    for name, (default, choices) in CHOICES.items():
        parser.add_argument(f"--{name}", type=str, default=default, choices=choices)
    absent: Any = argparse.SUPPRESS
    parser.add_argument("--kv_cache_type", type=KVCacheType, default=absent)
    parser.add_argument("--paged_kv_cache", type=str, default=absent)
    parser.add_argument("--lora_dir", type=str, default=None, nargs="+")
    parser.add_argument("--lora_target_modules", nargs="+", default=None, choices=LORA_MODULES)
