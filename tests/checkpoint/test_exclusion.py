"""Which modules a list of patterns keeps in bf16, which lists are refused, and what a checkpoint then consists of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.checkpoint.contract import (
    EXCLUDED_FROM_QUANTIZATION,
    QuantFormat,
    parse_pretrained_config,
    plan_config,
    plan_format,
    plan_rank,
)
from arctic_trt.checkpoint.exclusion import plan_exclusion, select, unnamed_to_fusion
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import Mapping, plan_mapping
from tests.support.checkpoints import TINY

LAYERS = 3
CONFIG: ArcticConfig = parse_config({**TINY, "num_hidden_layers": LAYERS})
MODULES = ("attention.qkv", "attention.dense", "mlp", "residual_mlp.fc", "residual_mlp.gate", "residual_mlp.proj")
TWINS = ("residual_mlp.fc", "residual_mlp.gate")
UNITS = ((MODULES[0],), (MODULES[1],), ("mlp",), TWINS, (MODULES[5],))
"""What can be excluded by itself: fc and gate of a residual MLP go together."""
Layouts = dict[str, tuple[str, tuple[int, ...]]]


def cut(**sizes: int) -> Mapping:
    return plan_mapping(CONFIG, **sizes)


def name(layer: int, module: str) -> str:
    return f"transformer.layers.{layer}.{module}"


def planned(patterns: Sequence[str], **sizes: int) -> tuple[str, ...]:
    return plan_exclusion(patterns, LAYERS, cut(**sizes))


def tensors(quant: QuantFormat, mapping: Mapping, rank: int) -> Layouts:
    return {spec.name: (spec.dtype, spec.shape) for spec in plan_rank(CONFIG, mapping.rank(rank), quant)}


@pytest.mark.parametrize(
    ("pattern", "layers", "modules"),
    [
        ("transformer.layers.1.mlp", [1], ["mlp"]),
        ("transformer.layers.2.attention.qkv", [2], ["attention.qkv"]),
        ("transformer.layers.0.attention.*", [0], ["attention.qkv", "attention.dense"]),
        ("*.residual_mlp.*", [0, 1, 2], ["residual_mlp.fc", "residual_mlp.gate", "residual_mlp.proj"]),
        ("*residual_mlp.proj", [0, 1, 2], ["residual_mlp.proj"]),
        ("transformer.layers.[02].*", [0, 2], MODULES),
        ("transformer.layers.[!1].mlp", [0, 2], ["mlp"]),
        ("transformer.layers.?.mlp", [0, 1, 2], ["mlp"]),
        ("*mlp", [0, 1, 2], ["mlp"]),
        ("*", [0, 1, 2], MODULES),
        ("transformer.layers.1.residual_mlp", [], []),
        ("transformer.layers.1.MLP", [], []),
        ("layers.1.mlp", [], []),
        ("*router", [], []),
        ("*mlp.fc", [0, 1, 2], ["residual_mlp.fc"]),
    ],
)
def test_what_a_pattern_selects(pattern: str, layers: list[int], modules: Sequence[str]) -> None:
    """As ``fnmatch.fnmatchcase`` on the names of TensorRT-LLM's modules; one that only contains others selects nothing."""
    assert select([pattern], LAYERS) == {(layer, module) for layer in layers for module in modules}


@pytest.mark.parametrize(
    ("patterns", "complaint"),
    [
        (
            ["transformer.layers.3.mlp"],
            "'transformer.layers.3.mlp' matches no module that is quantized. Those are .* 0 to 2, X one",
        ),
        (["*.mlp", "lm_head"], "'lm_head' matches no module that is quantized"),
        (["*router"], "matches no module that is quantized"),
        (
            ["transformer.layers.0.residual_mlp"],
            "no module that is quantized.*residual_mlp.fc, residual_mlp.gate, residual_mlp.proj",
        ),
        (["transformer.layers.1.mlp.fc"], "experts as a whole or not at all. Exclude transformer.layers.1.mlp, or"),
        (["transformer.layers.1.mlp.*"], "matches transformer.layers.1.mlp.fc, but TensorRT-LLM"),
        (["*.proj"], "'\\*.proj' matches transformer.layers.0.mlp.proj"),
        (["*.proj", "transformer.layers.[01].mlp"], "matches transformer.layers.2.mlp.proj"),
        (["*.residual_mlp.fc"], "one of transformer.layers.0.residual_mlp.fc and gate in bf16 .* Exclude both or none"),
        (["*.residual_mlp.gate", "*.[01].residual_mlp.fc"], "one of transformer.layers.2.residual_mlp.fc and gate"),
        (["*"], "excludes the model itself.*--qformat full_prec"),
    ],
)
def test_what_cannot_be_meant(patterns: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint) as caught:
        planned(patterns)
    assert caught.value.exit_code == 2 and str(caught.value).startswith("--exclude_modules")


@pytest.mark.parametrize(
    "patterns",
    [
        [],
        ["transformer.layers.1.mlp", "transformer.layers.1.mlp.*"],
        ["transformer.layers.0.residual_mlp.fc", "transformer.layers.0.residual_mlp.gate"],
        ["transformer.layers.0.*"],
        ["transformer.layers.*"],
        ["*.attention.dense", "*.mlp"],
    ],
)
def test_patterns_are_kept_as_they_are(patterns: list[str]) -> None:
    assert planned(patterns) == tuple(patterns)


@pytest.mark.parametrize(
    "patterns",
    [["transformer.layers.0.mlp"], ["*.[12].attention.qkv"], ["*.mlp", "transformer.layers.0.*"], ["*.0.mlp", "*.1.mlp"]],
)
def test_stages_share_one_list(patterns: list[str]) -> None:
    assert planned(patterns) == tuple(patterns)
    with pytest.raises(UsageError, match=r"in some layers only, but in 2 pipeline stages .* Select all layers .* --pp_size 1"):
        planned(patterns, pp_size=2)


@pytest.mark.parametrize("patterns", [["*.mlp"], ["*.[0-2].attention.*"], ["*.0.mlp", "*.[12].mlp"], ["transformer.layers.?.*"]])
def test_what_selects_all_layers_goes_with_stages(patterns: list[str]) -> None:
    assert planned(patterns, pp_size=2)[: len(patterns)] == tuple(patterns)


@pytest.mark.parametrize(
    ("patterns", "unnamed"),
    [
        (["*.residual_mlp.*"], [0, 1, 2]),
        (["transformer.layers.[01].*"], [0, 1]),
        (["transformer.layers.1.residual_mlp.??*", "transformer.layers.?.residual_mlp.fc"], [0, 1, 2]),
        (["*.residual_mlp.*", "transformer.layers.1.residual_mlp.fc"], [0, 2]),
        (["transformer.layers.*", "*.residual_mlp.*"], []),
        (["transformer.layers.2.residual_mlp.*"], []),
        (["*.mlp", "*residual_mlp.proj"], []),
    ],
)
def test_the_fused_mlp_of_tensorrt_llm_needs_names(patterns: list[str], unnamed: list[int]) -> None:
    """``fuse_gate_mlp`` looks for the name of fc in the list, or for the beginning of one that ends in an asterisk."""
    assert unnamed_to_fusion(patterns, LAYERS) == [name(layer, "residual_mlp.fc") for layer in unnamed]


def test_the_names_that_fusion_needs_are_added() -> None:
    expected = ("*.residual_mlp.*", *(name(layer, "residual_mlp.fc") for layer in range(LAYERS)))
    assert planned(["*.residual_mlp.*"]) == expected
    assert planned(["*.residual_mlp.*"], pp_size=2) == expected[:3], "the longer stage has two layers, counted from 0"
    assert unnamed_to_fusion(expected, LAYERS) == []


@st.composite
def exclusions(draw: st.DrawFn) -> set[tuple[int, str]]:
    units = [(layer, unit) for layer in range(LAYERS) for unit in UNITS]
    return {(layer, module) for layer, unit in draw(st.sets(st.sampled_from(units))) for module in unit}


@given(exclusions(), st.booleans(), st.sampled_from([{"tp_size": 1}, {"tp_size": 4, "moe_ep_size": 2}, {"tp_size": 16}]))
def test_a_mixed_checkpoint_is_a_mix_by_modules(excluded: set[tuple[int, str]], kv_fp8: bool, sizes: dict[str, int]) -> None:
    mapping = cut(**sizes)
    names = sorted(name(*each) for each in excluded)
    mixed = plan_format(fp8=True, kv_fp8=kv_fp8, exclude_modules=names, config=CONFIG, mapping=mapping)
    assert mixed.exclude_modules == tuple(names)
    for rank in range(mapping.world_size):
        bf16, fp8 = (tensors(QuantFormat(fp8=fp8, kv_fp8=kv_fp8), mapping, rank) for fp8 in (False, True))
        of_excluded = tuple(f"{each}." for each in names)
        expected = {key: bf16.get(key) if key.startswith(of_excluded) else layout for key, layout in fp8.items()}
        assert tensors(mixed, mapping, rank) == {key: layout for key, layout in expected.items() if layout}


@given(exclusions(), st.booleans())
def test_config_json_reads_back(excluded: set[tuple[int, str]], kv_fp8: bool) -> None:
    quant = plan_format(fp8=True, kv_fp8=kv_fp8, exclude_modules=[name(*e) for e in excluded], config=CONFIG, mapping=cut())
    raw = json.loads(json.dumps(plan_config(CONFIG, cut(), quant)))
    assert parse_pretrained_config(raw, "config.json") == (CONFIG, cut(), quant)
    assert quant.modules_in_bf16(LAYERS) == sorted(excluded) and hash(quant) is not None


def test_the_list_begins_with_tensorrt_llms_defaults() -> None:
    quant = QuantFormat(fp8=True, kv_fp8=True, exclude_modules=("*.mlp", "transformer.layers.0.attention.qkv"))
    listed = plan_config(CONFIG, cut(), quant)["quantization"]["exclude_modules"]
    assert listed == [*EXCLUDED_FROM_QUANTIZATION, "*.mlp", "transformer.layers.0.attention.qkv"]


def parsed(listed: object, quant_algo: str | None = "FP8", **sizes: int) -> QuantFormat:
    raw = plan_config(CONFIG, cut(**sizes), QuantFormat(fp8=True, kv_fp8=True))
    raw["quantization"] |= {"exclude_modules": listed, "quant_algo": quant_algo}
    return parse_pretrained_config(raw, "config.json")[2]


MODELOPT = ["lm_head", *(f"transformer.layers.{layer}.mlp.router" for layer in (2, 0, 1))]


@pytest.mark.parametrize(
    ("listed", "excluded"),
    [
        (None, ()),
        ([], ()),
        (list(EXCLUDED_FROM_QUANTIZATION), ()),
        (MODELOPT, ()),
        ([*MODELOPT, "transformer.layers.1.mlp"], ("transformer.layers.1.mlp",)),
        (["transformer.layers.1.mlp.fc", "*.9.mlp"], ()),
    ],
)
def test_lists_of_other_producers(listed: Any, excluded: tuple[str, ...]) -> None:
    """What is never quantized is named in several ways; part of a MoE means nothing to TensorRT-LLM."""
    assert parsed(listed) == QuantFormat(fp8=True, kv_fp8=True, exclude_modules=excluded)


def test_a_list_without_fp8_excludes_nothing() -> None:
    assert parsed(["*.mlp"], quant_algo=None) == QuantFormat(fp8=False, kv_fp8=True)


def test_layers_count_from_zero_in_each_stage() -> None:
    mapping = cut(pp_size=2)
    quant = parsed(["transformer.layers.1.mlp"], pp_size=2)
    stages = [tensors(quant, mapping, rank) for rank in range(2)]
    assert [stage["transformer.layers.0.mlp.fc.weight"][0] for stage in stages] == ["F8_E4M3"] * 2
    assert stages[0]["transformer.layers.1.mlp.fc.weight"][0] == "BF16", "the second stage has one layer only"


@pytest.mark.parametrize(
    ("listed", "complaint"),
    [
        ("*.mlp", "config.json has exclude_modules='\\*.mlp', expected null or a list"),
        ([1], "expected null or a list of patterns"),
        (["*.residual_mlp.gate"], "excludes one of residual_mlp.fc and residual_mlp.gate of layer 0 without the other"),
    ],
)
def test_lists_that_cannot_be_read(listed: object, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parsed(listed)
