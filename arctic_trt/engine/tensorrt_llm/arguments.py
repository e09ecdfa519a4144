"""The command line of ``trtllm-build`` for an Arctic checkpoint: what was asked for, over what Arctic needs.

The combinations refused here are those that TensorRT-LLM rejects after it has loaded the weights, or silently turns off:
``tensorrt_llm/commands/build.py`` (``main``, ``build_model``) and ``tensorrt_llm/builder.py`` (``build``) of 1.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.engine.config import BuildConfig
from arctic_trt.engine.tensorrt_llm.mixed import mixed_defaults
from arctic_trt.errors import UsageError
from arctic_trt.recipes.build import BuildRecipe
from arctic_trt.recipes.trtllm_build import Limits, trtllm_flags

Value = str | int | bool | Path | tuple[str, ...]

REFUSED = {
    ("reduce_fusion", "enable"): "TensorRT-LLM cannot fuse the all-reduce of a layer with a residual MLP",
    ("user_buffer", "enable"): "it needs --reduce_fusion, which Arctic's layer does not have",
    ("norm_quant_fusion", "enable"): "TensorRT-LLM turns it off for every architecture but one, and Arctic is not that one",
    ("pp_reduce_scatter", "enable"): "TensorRT-LLM accepts it for Mixtral alone",
    ("streamingllm", "enable"): "TensorRT-LLM no longer supports it",
    ("gemm_plugin", "nvfp4"): "the checkpoint is not in FP4",
    ("fuse_fp4_quant", "enable"): "the checkpoint is not in FP4",
}
ONLY_FOR_OTHER_MODELS = ("bert_attention_plugin", "mamba_conv1d_plugin", "bert_context_fmha_fp32_acc", "paged_state")
GATHERING = ("gather_context_logits", "gather_generation_logits", "gather_all_token_logits")
NO_INFLIGHT = "so that this engine runs neither under arctic-trt run nor behind Triton"


def plan_arguments(
    recipe: BuildRecipe, quant: QuantFormat, limits: BuildConfig, *, in_bf16: Collection[str] = ()
) -> dict[str, Value]:
    """Every flag that ``trtllm-build`` gets, without directories, ranks and timing caches; names have underscores.

    Defaults for Arctic: attention and GEMM plugins in bfloat16 as in the official recipe, the MoE plugin, and FP8 attention
    over prompts exactly where the KV cache is FP8. Limits are always explicit: left out, the batch is 2048, and with it the
    workspace of the experts. What some layer keeps ``in_bf16`` asks for other defaults (:func:`mixed_defaults`).
    """
    given = {name: value for name in trtllm_flags() if (value := getattr(recipe, name)) is not None}
    for name in ("input_timing_cache", "output_timing_cache"):
        given.pop(name, None)
    arctic: dict[str, Value] = {
        "gpt_attention_plugin": "bfloat16",
        "gemm_plugin": "bfloat16",
        "moe_plugin": "auto",
        "use_fp8_context_fmha": "enable" if quant.kv_fp8 else "disable",
        **mixed_defaults(quant, in_bf16),
    }
    sizes: dict[str, Value] = {} if "build_config" in given else _limits(limits)
    return {**sizes, **arctic, **given}


def _limits(limits: BuildConfig) -> dict[str, Value]:
    return {
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "max_beam_width": limits.max_beam_width,
    }


def check_arguments(
    recipe: BuildRecipe, arguments: Mapping[str, Any], quant: QuantFormat, *, pp_size: int, release: tuple[int, int]
) -> list[str]:
    """What a person should know about these arguments; raises :class:`UsageError` for those that cannot be built.

    ``release`` is TensorRT-LLM's, such as (1, 2).
    """
    for (name, value), why in REFUSED.items():
        if arguments.get(name) == value:
            raise UsageError(f"--{name} {value} does not fit Arctic: {why}.", "Leave it out.")
    if quant.fp8 and arguments.get("fp8_rowwise_gemm_plugin", "disable") != "disable":
        raise UsageError("--fp8_rowwise_gemm_plugin needs scales a row, the checkpoint has one a tensor.", "Leave it out.")
    gathers = [name for name in GATHERING if arguments.get(name)]
    if gathers and pp_size > 1:
        raise UsageError(
            f"--{gathers[0]} does not go with a pipeline of {pp_size} stages: its runner would wait forever for them.",
            "Quantize with --pp_size 1, or leave it out.",
        )
    _check_pairs(recipe, arguments)
    return [*_cost_notes(arguments), *_effect_notes(arguments, quant, release)]


def _check_pairs(recipe: BuildRecipe, arguments: Mapping[str, Any]) -> None:
    fused = [name for name in ("gemm_swiglu_plugin", "low_latency_gemm_swiglu_plugin") if arguments.get(name) == "fp8"]
    if fused and arguments.get("use_fused_mlp") == "disable":
        raise UsageError(f"--{fused[0]} fp8 needs --use_fused_mlp enable.")
    if arguments.get("multiple_profiles") == "enable" and "opt_num_tokens" in arguments:
        raise UsageError("--opt_num_tokens does not go with --multiple_profiles enable.", "Give one of them.")
    gathers = arguments.get("gather_context_logits") or arguments.get("gather_all_token_logits")
    if gathers and arguments.get("max_draft_len", 0) > 0:
        raise UsageError("--gather_context_logits does not go with --max_draft_len.", "Give one of them.")
    if ("model_cls_file" in arguments) != ("model_cls_name" in arguments):
        raise UsageError("--model_cls_file and --model_cls_name are given together or not at all.")
    if "build_config" in arguments:
        sizes = {"max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width", *Limits.model_fields}
        hidden = sorted(sizes & recipe.model_fields_set)
        if hidden:
            raise UsageError(f"--{hidden[0]} has no effect beside --build_config.", f"Write it into {recipe.build_config}.")


def _cost_notes(arguments: Mapping[str, Any]) -> list[str]:
    notes = []
    if arguments["moe_plugin"] == "disable":
        notes.append(
            "--moe_plugin disable makes the experts of plain TensorRT layers (OOTB), which TensorRT-LLM supports at what it "
            "calls a significant performance cost. Use it to compare, not to serve."
        )
    if arguments["gpt_attention_plugin"] == "disable":
        notes.append(f"--gpt_attention_plugin disable: TensorRT-LLM's C++ runtime needs that plugin, {NO_INFLIGHT}.")
    if arguments.get("remove_input_padding") == "disable":
        notes.append(f"--remove_input_padding disable: the C++ runtime takes packed prompts, {NO_INFLIGHT}.")
    if arguments.get("kv_cache_type", "paged") != "paged":
        notes.append(f"--kv_cache_type {arguments['kv_cache_type']}: the C++ runtime pages its KV cache, {NO_INFLIGHT}.")
    if arguments.get("use_paged_context_fmha") == "disable":
        notes.append("--use_paged_context_fmha disable: block reuse and chunked context will not be available.")
    return notes


def _effect_notes(arguments: Mapping[str, Any], quant: QuantFormat, release: tuple[int, int]) -> list[str]:
    notes = []
    if arguments["use_fp8_context_fmha"] == "enable" and not quant.kv_fp8:
        notes.append("--use_fp8_context_fmha enable has no effect: the KV cache of this checkpoint is not FP8.")
    if arguments["gemm_plugin"] == "fp8" and not quant.fp8:
        notes.append("--gemm_plugin fp8 has no effect: this checkpoint is not quantized.")
    if "build_config" in arguments and release < (1, 2):
        notes.append(f"TensorRT-LLM {release[0]}.{release[1]} prefers plugins that {arguments['build_config']} names over flags.")
    strangers = [name for name in ONLY_FOR_OTHER_MODELS if name in arguments]
    if strangers:
        notes.append(f"Arctic has nothing that {', '.join(f'--{name}' for name in strangers)} could act upon.")
    return notes


def command_line(arguments: Mapping[str, Value]) -> list[str]:
    """Words of a command line; True is a flag of its own, False is left out."""
    words: list[str] = []
    for name, value in arguments.items():
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        elif isinstance(value, tuple):
            words += [f"--{name}", *value]
        else:
            words += [f"--{name}", str(value)]
    return words
