"""Engines of an FP8 checkpoint that keeps some modules in bf16: which flags TensorRT-LLM cannot follow then.

Its module tree follows ``exclude_modules`` by itself (``quantize_layers``). Some passes after that take every layer for FP8 and
fail while they build, or worse: FP8 attention in ``build``, ``fuse_gate_mlp``, ``fc_gate_plugin`` and ``MoeOOTB`` of 1.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.checkpoint.exclusion import unnamed_to_fusion
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.errors import UsageError
from arctic_trt.model.names import MOE

DENSE, RESIDUAL_MLP = "attention.dense", ("residual_mlp.fc", "residual_mlp.gate", "residual_mlp.proj")
FP8_ATTENTION = "it makes attention's output FP8 in every layer, which a dense projection in bf16 cannot read"
FP8_SWIGLU = "it multiplies every residual MLP in FP8"
REFUSED = {
    ("use_fp8_context_fmha", "enable"): ((DENSE,), FP8_ATTENTION, "disable"),
    ("gemm_swiglu_plugin", "fp8"): (RESIDUAL_MLP, FP8_SWIGLU, "disable"),
    ("low_latency_gemm_swiglu_plugin", "fp8"): (RESIDUAL_MLP, FP8_SWIGLU, "disable"),
    ("moe_plugin", "disable"): ((MOE,), "it makes FP8 layers of all experts", "auto"),
}
"""Of a flag and its value: the modules that it does not go with, why, and a value that does."""
PAGED = ("use_paged_context_fmha", "enable")


def local_layers(checkpoint: TrtCheckpoint) -> int:
    """Layers of the longest pipeline stage."""
    return len(checkpoint.mapping.layers(0, checkpoint.config.num_hidden_layers))


def kept_in_bf16(checkpoint: TrtCheckpoint) -> list[str]:
    """The modules that at least one layer of an FP8 checkpoint keeps in bf16."""
    return sorted({module for _, module in checkpoint.quant.modules_in_bf16(local_layers(checkpoint))})


def mixed_defaults(quant: QuantFormat, in_bf16: Collection[str]) -> dict[str, str]:
    """Defaults that replace Arctic's: without FP8 attention where a layer's dense projection is in bf16.

    Over an FP8 KV cache, paged attention over prompts would turn it on again.
    """
    return dict.fromkeys(("use_fp8_context_fmha", PAGED[0]), "disable") if quant.kv_fp8 and DENSE in in_bf16 else {}


def check_mixed(arguments: Mapping[str, Any], checkpoint: TrtCheckpoint) -> None:
    """Raise :class:`UsageError` for arguments that such a checkpoint cannot be built with."""
    in_bf16 = kept_in_bf16(checkpoint)
    over_cache = {PAGED: ((DENSE,), f"over an FP8 KV cache {FP8_ATTENTION}", "disable")} if checkpoint.quant.kv_fp8 else {}
    for (name, value), (modules, why, instead) in {**REFUSED, **over_cache}.items():
        kept = [module for module in modules if module in in_bf16]
        if kept and arguments.get(name) == value:
            raise UsageError(
                f"--{name} {value} does not fit {checkpoint.checkpoint_dir}, which keeps {kept[0]} in bf16: {why}.",
                f"Give --{name} {instead}.",
            )
    unnamed = unnamed_to_fusion(checkpoint.quant.exclude_modules, local_layers(checkpoint))
    if unnamed and arguments.get("use_fused_mlp") != "disable":
        raise UsageError(
            f"{checkpoint.checkpoint_dir / 'config.json'} excludes {unnamed[0]} by a pattern, but TensorRT-LLM's use_fused_mlp "
            "looks for the name itself.",
            "Give --use_fused_mlp disable, or add the names to exclude_modules.",
        )
