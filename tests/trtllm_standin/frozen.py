"""Frozen names, defaults and choices, as NVIDIA's reference pages and source listings of 1.0.0, 1.1.0 and 1.2.1 show them.

Not derived from the stand-in, which is held to them.
"""

from __future__ import annotations

from typing import Any

FROM_DIR = (
    "engine_dir, *, lora_dir=None, rank=0, max_batch_size=None, max_input_len=None, max_output_len=None, "
    "max_beam_width=None, max_attention_window_size=None, sink_token_length=None, kv_cache_free_gpu_memory_fraction=None, "
    "cross_kv_cache_fraction=None, medusa_choices=None, eagle_choices=None, eagle_posterior_threshold=None, "
    "eagle_use_dynamic_tree=False, eagle_dynamic_tree_max_top_k=None, lookahead_config=None, debug_mode=False, "
    "lora_ckpt_source='hf', use_gpu_direct_storage=False, gpu_weights_percent=1, max_tokens_in_paged_kv_cache=None, "
    "kv_cache_enable_block_reuse=False, enable_chunked_context=False, is_enc_dec=False, multi_block_mode=True, "
    "enable_context_fmha_fp32_acc=None, cuda_graph_mode=None, logits_processor_map=None, device_ids=None, "
    "is_orchestrator_mode=False, use_runtime_defaults=True, gather_generation_logits=False, "
    "use_variable_beam_width_search=False, mm_embedding_offloading=False, fail_fast_on_attention_window_too_large=False"
)
GENERATE = (
    "batch_input_ids, *, position_ids=None, encoder_input_ids=None, encoder_input_features=None, "
    "encoder_output_lengths=None, cross_attention_masks=None, mrope_params=None, sampling_config=None, lora_uids=None, "
    "lookahead_config=None, streaming=False, stopping_criteria=None, logits_processor_names=None, max_new_tokens=1, "
    "end_id=None, pad_id=None, bad_words_list=None, stop_words_list=None, return_dict=False, output_sequence_lengths=False, "
    "output_generation_logits=False, output_log_probs=False, output_cum_log_probs=False, prompt_table=None, "
    "prompt_tasks=None, input_token_extra_ids=None, return_all_generated_tokens=False, language_adapter_uids=None, "
    "mm_embedding_offloading=False, **kwargs"
)
BUILD = {
    "build_model": "build_config, rank=0, ckpt_dir=None, model_config=None, model_cls=None, dry_run=False, **kwargs",
    "build_and_save": "rank, gpu_id, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs",
    "parallel_build": "model_config, ckpt_dir, build_config, output_dir, workers=1, log_level='info', model_cls=None, **kwargs",
}

DTYPES = "auto float16 float32 bfloat16 int32 disable"
ON_OFF = "enable disable"
ALIKE: list[tuple[Any, str, str]] = [
    (
        None,
        "",
        (
            "checkpoint_dir model_config build_config model_cls_file model_cls_name max_seq_len opt_num_tokens "
            "input_timing_cache visualize_network lora_dir"
        ),
    ),
    (0, "", "max_prompt_embedding_table_size max_draft_len"),
    (1, "", "max_beam_width workers"),
    (
        False,
        "",
        (
            "strip_plan weight_sparsity weight_streaming fast_build enable_debug_output dry_run monitor_memory "
            "gather_context_logits gather_generation_logits gather_all_token_logits"
        ),
    ),
    ("auto", DTYPES, "bert_attention_plugin gpt_attention_plugin nccl_plugin moe_plugin mamba_conv1d_plugin"),
    ("disable", DTYPES, "fp8_rowwise_gemm_plugin lora_plugin"),
    ("disable", "fp8 disable", "gemm_swiglu_plugin low_latency_gemm_plugin low_latency_gemm_swiglu_plugin"),
    (
        "enable",
        ON_OFF,
        ("context_fmha remove_input_padding use_paged_context_fmha paged_state use_fp8_context_fmha use_fused_mlp"),
    ),
    (
        "disable",
        ON_OFF,
        (
            "dora_plugin bert_context_fmha_fp32_acc norm_quant_fusion reduce_fusion user_buffer fuse_fp4_quant multiple_profiles "
            "streamingllm pp_reduce_scatter"
        ),
    ),
]
"""Default, choices, and the flags that have them."""
FLAGS: dict[str, tuple[Any, str]] = {
    **{name: (default, choices) for default, choices, names in ALIKE for name in names.split()},
    "gemm_allreduce_plugin": ("disable", "float16 bfloat16 disable"),
    "gemm_plugin": (None, "auto float16 float32 bfloat16 int32 fp8 nvfp4 disable"),
    "tokens_per_block": (32, ""),
    "output_dir": ("engine_outputs", ""),
    "max_batch_size": (2048, ""),
    "max_input_len": (1024, ""),
    "max_num_tokens": (8192, ""),
    "max_encoder_input_len": (1024, ""),
    "output_timing_cache": ("model.cache", ""),
    "profiling_verbosity": ("layer_names_only", "layer_names_only detailed none"),
    "log_level": ("info", "internal_error error warning info verbose debug trace"),
    "logits_dtype": (None, "float16 float32"),
    "lora_ckpt_source": ("hf", "hf nemo"),
    "max_lora_rank": (64, ""),
    "speculative_decoding_mode": (None, "draft_tokens_external lookahead_decoding medusa explicit_draft_tokens eagle"),
}
ONLY_BEFORE_1_2 = {"auto_parallel": (1, ""), "gpus_per_node": (8, "")}
