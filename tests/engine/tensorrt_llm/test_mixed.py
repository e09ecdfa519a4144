"""Flags of ``trtllm-build`` that a checkpoint with modules in bf16 cannot be built with, and defaults that it can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.contract import EXCLUDED_FROM_QUANTIZATION
from arctic_trt.checkpoint.trtllm import TrtCheckpoint
from arctic_trt.engine.config import plan_build_config
from arctic_trt.engine.tensorrt_llm.plan import TrtBuildPlan, plan_trtllm_build
from arctic_trt.engine.tensorrt_llm.versions import Versions
from arctic_trt.errors import UsageError
from arctic_trt.recipes import BuildRecipe
from tests.support.checkpoints import SMALL, random_ids, write_samples
from tests.support.jobs import quantize

EXCLUDED = {
    "experts": ["transformer.layers.1.mlp"],
    "qkv": ["*.attention.qkv"],
    "dense": ["transformer.layers.0.attention.dense"],
    "residual": ["*.residual_mlp.*"],
    "proj": ["*residual_mlp.proj"],
}
FP8_ATTENTION, PAGED = "use_fp8_context_fmha", "use_paged_context_fmha"
Make = Callable[..., TrtBuildPlan]


@pytest.fixture(scope="module")
def checkpoints(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with each exclusion, and one with ``dense`` and without an FP8 cache."""
    directory = tmp_path_factory.mktemp("mixed")
    samples = write_samples(directory / "samples.jsonl", random_ids(SMALL["vocab_size"], [5]))
    recipes = {name: {"exclude_modules": patterns} for name, patterns in EXCLUDED.items()}
    for name, recipe in {**recipes, "float": {**recipes["dense"], "kv_cache_dtype": "none"}}.items():
        quantize(small_model, directory / name, tp_size=1, calib_dataset=str(samples), **recipe)
    return directory


@pytest.fixture
def make(checkpoints: Path, tmp_path: Path) -> Make:
    def plan(name: str, **flags: Any) -> TrtBuildPlan:
        return plan_of(checkpoints / name, tmp_path / "engine", **flags)

    return plan


def plan_of(checkpoint_dir: Path, engine_dir: Path, **flags: Any) -> TrtBuildPlan:
    """As for a dry run, which needs no GPU."""
    opened = TrtCheckpoint(checkpoint_dir)
    return plan_trtllm_build(
        BuildRecipe(checkpoint_dir=checkpoint_dir, output_dir=engine_dir, **flags),
        opened,
        plan_build_config(opened.config),
        versions=Versions("1.2.1", None, assumed=True),
        gpus=[],
        available_bytes=0,
    )


@pytest.mark.parametrize(
    ("name", "fp8_attention", "paged"),
    [
        ("experts", "enable", None),
        ("qkv", "enable", None),
        ("residual", "enable", None),
        ("dense", "disable", "disable"),
        ("float", "disable", None),
    ],
)
def test_attention_is_fp8_unless_its_dense_projection_is_not(
    name: str, fp8_attention: str, paged: str | None, make: Make
) -> None:
    """With an FP8 cache, paged attention over prompts turns FP8 attention on, and the attention plugin's output is FP8 then."""
    plan = make(name)
    assert (plan.arguments[FP8_ATTENTION], plan.arguments.get(PAGED)) == (fp8_attention, paged)
    assert len(plan.notes) == (paged is not None), "that block reuse is not available is said"


@pytest.mark.parametrize(
    ("name", "flags", "complaint"),
    [
        ("dense", {FP8_ATTENTION: "enable"}, r"--use_fp8_context_fmha enable does not fit .*/dense, which keeps attention.dense"),
        (
            "dense",
            {PAGED: "enable"},
            "over an FP8 KV cache it makes attention's output FP8.* Give --use_paged_context_fmha disable",
        ),
        ("float", {FP8_ATTENTION: "enable"}, "--use_fp8_context_fmha enable does not fit"),
        ("experts", {"moe_plugin": "disable"}, "keeps mlp in bf16: it makes FP8 layers of all experts. Give --moe_plugin auto"),
        ("residual", {"gemm_swiglu_plugin": "fp8"}, "keeps residual_mlp.fc in bf16: it multiplies every residual MLP in FP8"),
        ("proj", {"low_latency_gemm_swiglu_plugin": "fp8"}, "keeps residual_mlp.proj in bf16"),
    ],
)
def test_what_takes_every_layer_for_fp8_is_refused(name: str, flags: dict[str, str], complaint: str, make: Make) -> None:
    with pytest.raises(UsageError, match=complaint):
        make(name, **flags)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("float", {PAGED: "enable"}),
        ("qkv", {FP8_ATTENTION: "enable", PAGED: "enable", "moe_plugin": "disable", "gemm_swiglu_plugin": "fp8"}),
        ("experts", {FP8_ATTENTION: "enable", PAGED: "enable", "gemm_swiglu_plugin": "fp8"}),
        ("residual", {FP8_ATTENTION: "enable", PAGED: "enable", "moe_plugin": "disable", "gemm_plugin": "fp8"}),
    ],
)
def test_everything_else_is_as_it_was(name: str, flags: dict[str, str], make: Make) -> None:
    assert flags.items() <= make(name, **flags).arguments.items()


def test_a_list_without_names_does_not_go_with_the_fused_mlp(checkpoints: Path, tmp_path: Path, make: Make) -> None:
    """Lists of ours have the names beside the pattern; ``fuse_gate_mlp`` of TensorRT-LLM does not know patterns."""
    make("residual")
    path = checkpoints / "residual" / "config.json"
    before = path.read_text()
    raw = json.loads(before)
    assert raw["quantization"]["exclude_modules"][6:] == [
        "*.residual_mlp.*",
        *(f"transformer.layers.{layer}.residual_mlp.fc" for layer in (0, 1)),
    ]
    raw["quantization"]["exclude_modules"] = [*EXCLUDED_FROM_QUANTIZATION, "*.residual_mlp.*"]
    path.write_text(json.dumps(raw))
    try:
        with pytest.raises(UsageError, match=r"excludes transformer.layers.0.residual_mlp.fc by a pattern, .* use_fused_mlp"):
            make("residual")
        assert make("residual", use_fused_mlp="disable").arguments["use_fused_mlp"] == "disable"
    finally:
        path.write_text(before)
