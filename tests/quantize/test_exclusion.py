"""Checkpoints of which some modules stay in bf16: module by module the bytes of the bf16 or of the FP8 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arctic_trt.checkpoint.contract import EXCLUDED_FROM_QUANTIZATION
from arctic_trt.checkpoint.exclusion import select
from tests.support.checkpoints import SMALL, TINY, Tensors, random_checkpoint, random_ids, write_samples
from tests.support.jobs import quantize, read_ranks, read_report

LAYERS = TINY["num_hidden_layers"]
ATTENTION = ("transformer.layers.0.attention.*",)
SOME = ("transformer.layers.0.mlp", "*.residual_mlp.*", "transformer.layers.1.attention.qkv")
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "experts of a layer": ({"tp_size": 4, "moe_ep_size": 2}, ("transformer.layers.1.mlp",)),
    "attention of a layer": ({"tp_size": 1}, ATTENTION),
    "a bit of everything": ({"tp_size": 2}, SOME),
    "a projection, in stages": ({"tp_size": 2, "pp_size": 2}, ("*residual_mlp.proj", "*.attention.dense")),
    "everything": ({"tp_size": 1}, ("transformer.layers.*",)),
    "without an FP8 cache": ({"tp_size": 1, "kv_cache_dtype": "none"}, ATTENTION),
}


def bits(tensors: Tensors) -> dict[str, tuple[str, bytes]]:
    return {name: (str(t.dtype), t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def check_mix(mixed: Path, fp8: Path, bf16: Path, patterns: tuple[str, ...], layers: int, stages: int) -> None:
    """Excluded modules have the tensors of ``bf16`` and no other, everything else has those of ``fp8``."""
    excluded = tuple(f"transformer.layers.{layer}.{module}." for layer, module in select(patterns, layers))
    assert excluded
    for found, quantized, plain in zip(*map(read_ranks, (mixed, fp8, bf16)), strict=True):
        expected = {name: value for name, value in bits(quantized).items() if not name.startswith(excluded)}
        expected |= {name: value for name, value in bits(plain).items() if name.startswith(excluded)}
        assert bits(found) == expected
        assert stages > 1 or {name.split(".")[2] for name in found if "kv_cache" in name} in (set(map(str, range(layers))), set())


@pytest.mark.parametrize(("recipe", "patterns"), CASES.values(), ids=CASES.keys())
def test_each_module_has_the_bytes_of_its_format(
    recipe: dict[str, Any], patterns: tuple[str, ...], tiny_model: Path, tiny_samples: Path, tmp_path: Path
) -> None:
    given = {**recipe, "calib_dataset": str(tiny_samples)}
    sizes = {name: size for name, size in given.items() if name != "kv_cache_dtype"}
    report = quantize(tiny_model, tmp_path / "mixed", exclude_modules=patterns, **given)
    quantize(tiny_model, tmp_path / "fp8", **given)
    quantize(tiny_model, tmp_path / "bf16", qformat="full_prec", **sizes)
    check_mix(*(tmp_path / kind for kind in ("mixed", "fp8", "bf16")), patterns, LAYERS, recipe.get("pp_size", 1))
    listed = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization"]["exclude_modules"]
    assert listed[: 6 + len(patterns)] == [*EXCLUDED_FROM_QUANTIZATION, *patterns]
    assert report["modules_in_bf16"] == sorted(map(list, select(patterns, LAYERS)))


@settings(max_examples=8, deadline=None)
@given(
    chosen=st.sets(
        st.sampled_from(["mlp", "attention.qkv", "attention.dense", "residual_mlp.[fg]*", "residual_mlp.proj"]), min_size=1
    )
)
def test_any_modules_of_a_layer(chosen: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("any")
    model = random_checkpoint(directory / "model", SMALL)
    samples = str(write_samples(directory / "samples.jsonl", random_ids(SMALL["vocab_size"], [6, 4])))
    patterns = tuple(f"transformer.layers.1.{module}" for module in sorted(chosen))
    for name, recipe in {"mixed": {"exclude_modules": patterns}, "fp8": {}, "bf16": {"qformat": "full_prec"}}.items():
        quantize(model, directory / name, calib_dataset=samples, tp_size=2, **recipe)
    check_mix(*(directory / kind for kind in ("mixed", "fp8", "bf16")), patterns, SMALL["num_hidden_layers"], 1)


def test_exclusions_change_no_other_scale(tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    """Calibration runs in bf16 from end to end, so that what one module rounds off does not reach the next one's maximum."""
    for name, patterns in {"fp8": (), "mixed": SOME}.items():
        quantize(tiny_model, tmp_path / name, tp_size=1, calib_dataset=str(tiny_samples), exclude_modules=patterns)
    plain, mixed = (read_report(tmp_path / name) for name in ("fp8", "mixed"))
    assert plain["tokens_per_expert"] == mixed["tokens_per_expert"] and plain["modules_in_bf16"] == []
    for layer, (before, after) in enumerate(zip(plain["scales"], mixed["scales"], strict=True)):
        gone = tuple(f"{module}." for where, module in select(SOME, LAYERS) if where == layer)
        assert after == {name: scale for name, scale in before.items() if not name.startswith(gone)}
        assert "attention.kv_cache_scaling_factor" in after
