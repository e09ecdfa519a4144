"""The flags of ``trtllm-build`` that ``arctic-trt build`` passes on, by the name, type and choices that TensorRT-LLM gives them.

Sources: ``tensorrt_llm/commands/build.py`` and ``tensorrt_llm/plugin/plugin.py`` of 1.0 to 1.2. A flag that is left out is not
passed, so that TensorRT-LLM's own default holds, except where ``arctic_trt.engine.tensorrt_llm.arguments`` has one for Arctic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from arctic_trt.recipes.base import Recipe

Switch = Literal["enable", "disable"]
PluginDtype = Literal["auto", "float16", "float32", "bfloat16", "int32", "disable"]
Fp8Only = Literal["fp8", "disable"]


class Plugins(Recipe):
    """TensorRT-LLM plugins; auto means the checkpoint's dtype."""

    gpt_attention_plugin: PluginDtype | None = Field(None, description="Attention. Its runtime needs it.  [Arctic: bfloat16]")
    gemm_plugin: Literal["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable"] | None = Field(
        None, description="Matrix products that are not quantized; fp8: those that are.  [Arctic: bfloat16]"
    )
    moe_plugin: PluginDtype | None = Field(None, description="Experts; disable is many times slower.  [Arctic: auto]")
    nccl_plugin: PluginDtype | None = Field(None, description="Communication between ranks.  [default: auto]")
    gemm_swiglu_plugin: Fp8Only | None = Field(None, description="Fused residual MLP, Hopper.  [default: disable]")
    low_latency_gemm_plugin: Fp8Only | None = Field(None, description="FP8 products of few tokens.  [default: disable]")
    low_latency_gemm_swiglu_plugin: Fp8Only | None = Field(None, description="Both of these at once.  [default: disable]")
    gemm_allreduce_plugin: Literal["float16", "bfloat16", "disable"] | None = Field(
        None, description="Product and all-reduce in one kernel.  [default: disable]"
    )
    fp8_rowwise_gemm_plugin: PluginDtype | None = Field(None, description="Not for Arctic's scales.  [default: disable]")
    bert_attention_plugin: PluginDtype | None = Field(None, description="Of encoders.  [default: auto]")
    mamba_conv1d_plugin: PluginDtype | None = Field(None, description="Of Mamba models.  [default: auto]")
    lora_plugin: PluginDtype | None = Field(None, description="LoRA.  [default: disable]")
    dora_plugin: Switch | None = Field(None, description="DoRA.  [default: disable]")


class Features(Recipe):
    """TensorRT-LLM features."""

    use_fp8_context_fmha: Switch | None = Field(None, description="FP8 attention over prompts.  [Arctic: enable with FP8 KV]")
    use_paged_context_fmha: Switch | None = Field(None, description="Block reuse, chunked context.  [default: enable]")
    context_fmha: Switch | None = Field(None, description="Fused attention over prompts.  [default: enable]")
    remove_input_padding: Switch | None = Field(None, description="Pack prompts.  [default: enable]")
    use_fused_mlp: Switch | None = Field(None, description="Join the residual MLP's gate and fc.  [default: enable]")
    multiple_profiles: Switch | None = Field(None, description="More kernels to choose from.  [default: disable]")
    reduce_fusion: Switch | None = Field(None, description="Not for Arctic's layer.  [default: disable]")
    user_buffer: Switch | None = Field(None, description="Needs reduce_fusion.  [default: disable]")
    norm_quant_fusion: Switch | None = Field(None, description="Not for Arctic.  [default: disable]")
    pp_reduce_scatter: Switch | None = Field(None, description="Mixtral alone.  [default: disable]")
    fuse_fp4_quant: Switch | None = Field(None, description="FP4 checkpoints alone.  [default: disable]")
    paged_state: Switch | None = Field(None, description="Recurrent models.  [default: enable]")
    streamingllm: Switch | None = Field(None, description="No longer supported.  [default: disable]")
    bert_context_fmha_fp32_acc: Switch | None = Field(None, description="Of encoders.  [default: disable]")
    kv_cache_type: Literal["continuous", "paged", "disabled"] | None = Field(None, description="[default: paged]")
    tokens_per_block: int | None = Field(None, ge=1, description="Of a block of the KV cache.  [default: 32]")


class Limits(Recipe):
    """TensorRT-LLM limits beyond those above."""

    opt_num_tokens: int | None = Field(None, ge=1, description="Tune for so many tokens.  [default: max_batch_size]")
    max_encoder_input_len: int | None = Field(None, ge=1, description="Of encoders.  [default: 1024]")
    max_prompt_embedding_table_size: int | None = Field(None, ge=0, description="Prompt tuning.  [default: 0]")
    max_draft_len: int | None = Field(None, ge=0, description="Speculative decoding.  [default: 0]")
    speculative_decoding_mode: (
        Literal["draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"] | None
    ) = Field(None, description="[default: none]")


class Logits(Recipe):
    """TensorRT-LLM logits."""

    logits_dtype: Literal["float16", "float32"] | None = Field(None, description="[default: the checkpoint's]")
    gather_context_logits: bool | None = Field(None, description="Keep the prompt's, for --output_logits_npy.")
    gather_generation_logits: bool | None = Field(None, description="Keep those of new tokens.")
    gather_all_token_logits: bool | None = Field(None, description="Keep both.")


class Lora(Recipe):
    """TensorRT-LLM LoRA."""

    lora_dir: tuple[str, ...] | None = Field(None, description="Directories of adapters.")
    lora_ckpt_source: Literal["hf", "nemo"] | None = Field(None, description="[default: hf]")
    lora_target_modules: tuple[str, ...] | None = Field(None, description="[default: the adapter's]")
    max_lora_rank: int | None = Field(None, ge=1, description="[default: 64]")


class Building(Recipe):
    """TensorRT-LLM, how it builds."""

    input_timing_cache: Path | None = Field(None, description="[default: this GPU type's, in --timing_cache_dir]")
    output_timing_cache: Path | None = Field(None, description="[default: the same]")
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] | None = Field(None, description="Of the engine.")
    fast_build: bool | None = Field(None, description="Build faster, run slower.")
    strip_plan: bool | None = Field(None, description="Leave the weights out of the engine.")
    weight_sparsity: bool | None = Field(None, description="Use sparse kernels.")
    weight_streaming: bool | None = Field(None, description="Let the runtime keep weights in host memory.")
    build_config: Path | None = Field(None, description="JSON file that replaces all limits.")
    model_cls_file: Path | None = Field(None, description="Python file of a model class of your own.")
    model_cls_name: str | None = Field(None, description="Its name.")
    auto_parallel: int | None = Field(None, ge=1, description="1.0 and 1.1 alone.  [default: 1]")
    gpus_per_node: int | None = Field(None, ge=1, description="1.0 and 1.1 alone.  [default: 8]")
    cluster_key: str | None = Field(None, description="1.0 and 1.1 alone.  [default: asks the GPU]")
    log_level: Literal["internal_error", "error", "warning", "info", "verbose", "debug", "trace"] | None = Field(
        None, description="Of the rank's log.  [default: info]"
    )
    enable_debug_output: bool | None = Field(None, description="Mark debug tensors.")
    visualize_network: Path | None = Field(None, description="Directory for the network as ONNX.")
    monitor_memory: bool | None = Field(None, description="Log the memory of the build.")


GROUPS: tuple[type[Recipe], ...] = (Plugins, Features, Limits, Logits, Lora, Building)
ALIASES = {"max_decoder_seq_len": "max_seq_len", "max_multimodal_len": "max_prompt_embedding_table_size"}
"""Second names that ``trtllm-build`` has for a flag."""
REMOVED = {
    "tp_size": "The checkpoint decides: arctic-trt quantize --tp_size.",
    "pp_size": "The checkpoint decides: arctic-trt quantize --pp_size.",
    "world_size": "The checkpoint decides: arctic-trt quantize --tp_size and --pp_size.",
    "weight_only_precision": "The checkpoint decides: arctic-trt quantize --qformat.",
    "model_config": "--checkpoint_dir contains it.",
    "max_output_len": "Use --max_seq_len, which counts prompt and output together.",
    "paged_kv_cache": "Use --kv_cache_type paged or disabled.",
    "use_custom_all_reduce": "Leave it out: the all-reduce is chosen at run time.",
    "multi_block_mode": "Leave it out: it belongs to the runtime, where it is on.",
    "context_fmha_fp32_acc": "Leave it out: it belongs to the runtime.",
    "enable_xqa": "Leave it out: XQA kernels are chosen by themselves.",
    "strongly_typed": "Leave it out: engines are always strongly typed.",
    "builder_opt": "Leave it out: TensorRT-LLM decides.",
    "lookup_plugin": "Leave it out: there is no such plugin any more.",
    "attention_qk_half_accumulation": "Leave it out: there is no successor.",
    "use_context_fmha_for_generation": "Leave it out: there is no successor.",
}
"""Flags of older versions, or of no use here, and what to do instead."""


class TrtLlmBuildFlags(Building, Lora, Logits, Limits, Features, Plugins):
    """All of them; the base classes are the sections of the help."""


def trtllm_flags() -> dict[str, type[Recipe]]:
    """Every flag's name, with the section it belongs to."""
    return {name: group for group in GROUPS for name in group.model_fields}
