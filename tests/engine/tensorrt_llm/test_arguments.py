"""The command line of ``trtllm-build``: Arctic's defaults, what is asked for over them, and what cannot be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.contract import QuantFormat
from arctic_trt.engine.config import BuildConfig
from arctic_trt.engine.tensorrt_llm.arguments import check_arguments, command_line, plan_arguments
from arctic_trt.errors import UsageError
from arctic_trt.recipes import BuildRecipe

FP8, BF16 = QuantFormat(fp8=True, kv_fp8=True), QuantFormat(fp8=False, kv_fp8=False)
FP8_WEIGHTS = QuantFormat(fp8=True, kv_fp8=False)
LIMITS = BuildConfig(max_batch_size=256, max_input_len=4096, max_seq_len=4096, max_num_tokens=8192, max_beam_width=1)


def recipe(**given: Any) -> BuildRecipe:
    return BuildRecipe(checkpoint_dir=Path("ckpt"), output_dir=Path("engine"), **given)


def arguments(quant: QuantFormat = FP8, **given: Any) -> dict[str, Any]:
    return plan_arguments(recipe(**given), quant, LIMITS)


def notes(quant: QuantFormat = FP8, pp_size: int = 1, release: tuple[int, int] = (1, 2), **given: Any) -> list[str]:
    return check_arguments(recipe(**given), arguments(quant, **given), quant, pp_size=pp_size, release=release)


def test_arctics_defaults() -> None:
    assert arguments() == {
        "max_batch_size": 256,
        "max_input_len": 4096,
        "max_seq_len": 4096,
        "max_num_tokens": 8192,
        "max_beam_width": 1,
        "gpt_attention_plugin": "bfloat16",
        "gemm_plugin": "bfloat16",
        "moe_plugin": "auto",
        "use_fp8_context_fmha": "enable",
    }
    assert notes() == []


@pytest.mark.parametrize(("quant", "expected"), [(FP8, "enable"), (FP8_WEIGHTS, "disable"), (BF16, "disable")])
def test_fp8_attention_goes_with_an_fp8_cache(quant: QuantFormat, expected: str) -> None:
    assert arguments(quant)["use_fp8_context_fmha"] == expected


def test_what_is_given_wins() -> None:
    found = arguments(gemm_plugin="fp8", moe_plugin="disable", tokens_per_block=64, gather_context_logits=True)
    assert (found["gemm_plugin"], found["moe_plugin"], found["tokens_per_block"]) == ("fp8", "disable", 64)
    assert found["gather_context_logits"] is True


def test_timing_caches_are_planned_elsewhere() -> None:
    assert arguments(input_timing_cache=Path("a"), output_timing_cache=Path("b")) == arguments()


def test_a_file_of_limits_replaces_ours() -> None:
    found = arguments(build_config=Path("limits.json"))
    assert not {"max_batch_size", "max_seq_len"} & set(found) and found["build_config"] == Path("limits.json")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"reduce_fusion": "enable"}, "--reduce_fusion enable does not fit Arctic"),
        ({"user_buffer": "enable"}, "--user_buffer enable does not fit Arctic: it needs --reduce_fusion"),
        ({"norm_quant_fusion": "enable"}, "--norm_quant_fusion enable does not fit"),
        ({"pp_reduce_scatter": "enable"}, "Mixtral alone"),
        ({"streamingllm": "enable"}, "no longer supports it"),
        ({"gemm_plugin": "nvfp4"}, "not in FP4"),
        ({"fuse_fp4_quant": "enable"}, "not in FP4"),
        ({"fp8_rowwise_gemm_plugin": "auto"}, "needs scales a row, the checkpoint has one a tensor"),
        ({"gemm_swiglu_plugin": "fp8", "use_fused_mlp": "disable"}, "--gemm_swiglu_plugin fp8 needs --use_fused_mlp"),
        ({"low_latency_gemm_swiglu_plugin": "fp8", "use_fused_mlp": "disable"}, "needs --use_fused_mlp enable"),
        ({"multiple_profiles": "enable", "opt_num_tokens": 64}, "--opt_num_tokens does not go with --multiple_profiles"),
        ({"gather_context_logits": True, "max_draft_len": 3}, "does not go with --max_draft_len"),
        ({"gather_all_token_logits": True, "max_draft_len": 3}, "does not go with --max_draft_len"),
        ({"model_cls_name": "Mine"}, "--model_cls_file and --model_cls_name are given together"),
        ({"build_config": Path("a.json"), "max_batch_size": 8}, "--max_batch_size has no effect beside --build_config"),
        ({"build_config": Path("a.json"), "opt_num_tokens": 8}, "--opt_num_tokens has no effect beside --build_config"),
    ],
)
def test_what_cannot_be_built(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        notes(**given)


@pytest.mark.parametrize("name", ["gather_context_logits", "gather_generation_logits", "gather_all_token_logits"])
def test_logits_do_not_cross_pipeline_stages(name: str) -> None:
    assert notes(**{name: True}) == []
    with pytest.raises(UsageError, match=f"--{name} does not go with a pipeline of 2 stages"):
        notes(pp_size=2, **{name: True})


@pytest.mark.parametrize(
    ("given", "note"),
    [
        ({"moe_plugin": "disable"}, r"--moe_plugin disable .*\(OOTB\).*significant performance cost"),
        ({"gpt_attention_plugin": "disable"}, "--gpt_attention_plugin disable: TensorRT-LLM's C\\+\\+ runtime needs that plugin"),
        ({"remove_input_padding": "disable"}, "takes packed prompts"),
        ({"kv_cache_type": "continuous"}, "pages its KV cache"),
        ({"use_paged_context_fmha": "disable"}, "block reuse and chunked context will not be available"),
        ({"mamba_conv1d_plugin": "auto", "paged_state": "enable"}, "nothing that --mamba_conv1d_plugin, --paged_state could"),
    ],
)
def test_what_is_allowed_but_should_be_known(given: dict[str, Any], note: str) -> None:
    [found] = notes(**given)
    assert re.search(note, found)


def test_flags_without_effect_are_named() -> None:
    assert "no effect: the KV cache" in notes(FP8_WEIGHTS, use_fp8_context_fmha="enable")[0]
    assert "no effect: this checkpoint is not quantized" in notes(BF16, gemm_plugin="fp8")[0]


def test_which_plugins_a_file_of_limits_overrules_depends_on_the_version() -> None:
    assert notes(build_config=Path("a.json")) == []
    assert "1.1 prefers plugins that a.json names over flags" in notes(release=(1, 1), build_config=Path("a.json"))[0]


def test_words_of_a_command_line() -> None:
    values = {"a": 1, "b": "x", "c": True, "d": False, "e": ("p", "q"), "f": Path("y z")}
    assert command_line(values) == ["--a", "1", "--b", "x", "--c", "--e", "p", "q", "--f", "y z"]
