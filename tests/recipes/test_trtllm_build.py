"""The flags of ``trtllm-build``: names, choices and what became of old ones, against what each version documents."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from arctic_trt.errors import UsageError
from arctic_trt.recipes import BuildRecipe, resolve
from arctic_trt.recipes.trtllm_build import ALIASES, GROUPS, REMOVED, TrtLlmBuildFlags, trtllm_flags
from tests.conftest import Finished

REQUIRED = {"checkpoint_dir": Path("checkpoint"), "output_dir": Path("engine")}
DTYPES = {"auto", "float16", "float32", "bfloat16", "int32", "disable"}
SWITCH = {"enable", "disable"}

DOCUMENTED: dict[str, Any] = {
    **dict.fromkeys(
        (
            "bert_attention_plugin",
            "gpt_attention_plugin",
            "nccl_plugin",
            "moe_plugin",
            "mamba_conv1d_plugin",
            "fp8_rowwise_gemm_plugin",
            "lora_plugin",
        ),
        DTYPES,
    ),
    "gemm_plugin": DTYPES | {"fp8", "nvfp4"},
    "gemm_swiglu_plugin": {"fp8", "disable"},
    "low_latency_gemm_plugin": {"fp8", "disable"},
    "low_latency_gemm_swiglu_plugin": {"fp8", "disable"},
    "gemm_allreduce_plugin": {"float16", "bfloat16", "disable"},
    **dict.fromkeys(
        (
            "context_fmha",
            "remove_input_padding",
            "use_paged_context_fmha",
            "use_fp8_context_fmha",
            "paged_state",
            "use_fused_mlp",
            "dora_plugin",
            "bert_context_fmha_fp32_acc",
            "norm_quant_fusion",
            "reduce_fusion",
            "user_buffer",
            "fuse_fp4_quant",
            "multiple_profiles",
            "streamingllm",
            "pp_reduce_scatter",
        ),
        SWITCH,
    ),
    "kv_cache_type": {"continuous", "paged", "disabled"},
    "profiling_verbosity": {"layer_names_only", "detailed", "none"},
    "logits_dtype": {"float16", "float32"},
    "lora_ckpt_source": {"hf", "nemo"},
    "speculative_decoding_mode": {"draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"},
    "log_level": {"internal_error", "error", "warning", "info", "verbose", "debug", "trace"},
    **dict.fromkeys(
        (
            "tokens_per_block",
            "opt_num_tokens",
            "max_encoder_input_len",
            "max_prompt_embedding_table_size",
            "max_draft_len",
            "max_lora_rank",
            "auto_parallel",
            "gpus_per_node",
        ),
        int,
    ),
    **dict.fromkeys(
        (
            "gather_context_logits",
            "gather_generation_logits",
            "gather_all_token_logits",
            "fast_build",
            "strip_plan",
            "weight_sparsity",
            "weight_streaming",
            "enable_debug_output",
            "monitor_memory",
        ),
        bool,
    ),
    **dict.fromkeys(("input_timing_cache", "output_timing_cache", "build_config", "model_cls_file", "visualize_network"), Path),
    **dict.fromkeys(("model_cls_name", "cluster_key"), str),
    **dict.fromkeys(("lora_dir", "lora_target_modules"), tuple),
}
"""Every flag of ``trtllm-build --help`` of 1.0.0, 1.1.0 and 1.2.1 that is not a flag of ours too, with what it takes."""


def takes(name: str) -> Any:
    [kind] = [kind for kind in get_args(TrtLlmBuildFlags.model_fields[name].annotation) if kind is not types.NoneType]
    if get_origin(kind) is Literal:
        return set(get_args(kind))
    return get_origin(kind) or kind


def test_every_documented_flag_is_there_and_no_other() -> None:
    assert {name: takes(name) for name in trtllm_flags()} == DOCUMENTED
    assert set(trtllm_flags()) == set(TrtLlmBuildFlags.model_fields)


def test_flags_that_are_gone_are_not_also_there() -> None:
    assert not set(REMOVED) & set(BuildRecipe.model_fields)
    assert set(ALIASES.values()) <= set(BuildRecipe.model_fields)
    assert all(advice.endswith(".") for advice in REMOVED.values())


def test_nothing_is_set_unless_it_is_given() -> None:
    recipe = BuildRecipe(**REQUIRED)
    assert recipe.trtllm_only == [] and all(getattr(recipe, name) is None for name in trtllm_flags())
    assert BuildRecipe(**REQUIRED, moe_plugin="auto", ranks="0-3").trtllm_only == ["moe_plugin", "ranks"]


def test_the_help_has_every_flag_in_its_section(arctic_trt: Callable[..., Finished]) -> None:
    lines = arctic_trt("build", "--help").out.splitlines()
    sections = [str(group.__doc__).rstrip(".") + ":" for group in GROUPS]
    begins = [lines.index(section) for section in sections]
    assert begins == sorted(begins)
    for group, begin, end in zip(GROUPS, begins, [*begins[1:], len(lines)], strict=True):
        text = "\n".join(lines[begin:end])
        assert all(f"--{name}" in text for name in group.model_fields)


@pytest.mark.parametrize("name", REMOVED)
@pytest.mark.parametrize("value", [["8"], []], ids=["with a value", "without"])
def test_a_flag_of_an_older_version_says_what_to_do(name: str, value: list[str], arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt("build", "--checkpoint_dir", "x", "--output_dir", "y", f"--{name}", *value)
    assert done.code == 2 and f"--{name} is not taken here. {REMOVED[name]}" in done.err


def test_a_flag_of_an_older_version_in_a_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_output_len: 512\n")
    with pytest.raises(UsageError, match=r"unknown key 'max_output_len'\. Use --max_seq_len"):
        resolve(BuildRecipe, REQUIRED, path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("gemm_plugin: bf16", "gemm_plugin 'bf16' is not valid: input should be 'auto', 'float16'"),
        ("use_fused_mlp: true", "use_fused_mlp True is not valid: input should be 'enable' or 'disable'"),
        ("tokens_per_block: 0", "tokens_per_block 0 is not valid"),
        ("moe_plugins: auto", "Did you mean 'moe_plugin'"),
        ("expects: {machine: x}", "expects"),
    ],
)
def test_values_of_a_file_are_checked(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(line + "\n")
    with pytest.raises(UsageError) as caught:
        resolve(BuildRecipe, REQUIRED, path)
    assert complaint in str(caught.value)


def test_one_rank_in_a_file_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("ranks: 3\n")
    assert resolve(BuildRecipe, REQUIRED, path).ranks == "3"
