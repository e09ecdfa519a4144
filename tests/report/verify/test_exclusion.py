"""A checkpoint that keeps some modules in bf16: held to its own config.json, module by module."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arctic_trt.checkpoint.contract import EXCLUDED_FROM_QUANTIZATION
from arctic_trt.report.verify.run import verify, verify_structure
from tests.report.verify.damages import LAYER0, LAYER1, edit, edit_config, flip, put
from tests.support.engines import build_engine
from tests.support.jobs import quantize

EXCLUDED = [f"{LAYER0}mlp", f"{LAYER1}attention.qkv", f"{LAYER1}residual_mlp.proj"]
MODELOPT = ["lm_head", f"{LAYER1}mlp.router", f"{LAYER0}mlp.router"]


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mixed") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2, exclude_modules=EXCLUDED)
    return directory


@pytest.fixture
def copy(mixed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed, tmp_path / "copy"))


def list_modules(path: Path, modules: list[str] | None) -> None:
    edit_config(path, lambda raw: raw["quantization"].update(exclude_modules=modules))  # type: ignore[attr-defined]


def test_nothing_is_found_in_what_is_right(mixed: Path, tiny_model: Path) -> None:
    assert verify_structure(mixed).findings == verify(mixed).findings == []
    found = verify(mixed, tiny_model)
    assert found.findings == []
    assert len(found.qualities) == 2 * (7 + 3 * 8) - (3 * 8 + 3 + 1), "what is not cast has lost nothing"


Spoil = Callable[[Path], object]
STRUCTURE: dict[str, tuple[Spoil, str, str]] = {
    "a scale of a quantized module": (
        lambda path: edit(path, lambda t: t.pop(f"{LAYER0}attention.qkv.weights_scaling_factor"), [2]),
        "missing",
        f"{LAYER0}attention.qkv.weights_scaling_factor",
    ),
    "an experts' scale of a quantized module": (
        lambda path: edit(path, lambda t: t.pop(f"{LAYER1}mlp.proj.activation_scaling_factor")),
        "missing",
        f"{LAYER1}mlp.proj.activation_scaling_factor",
    ),
    "a bf16 matrix where fp8 is due": (
        lambda path: edit(path, lambda t: put(t, f"{LAYER1}mlp.fc.weight", t[f"{LAYER1}mlp.fc.weight"].bfloat16()), [1]),
        "dtype",
        f"{LAYER1}mlp.fc.weight",
    ),
    "codes where bf16 is due": (
        lambda path: edit(path, lambda t: put(t, f"{LAYER0}mlp.fc.weight", t[f"{LAYER0}mlp.fc.weight"].to(torch.float8_e4m3fn))),
        "dtype",
        f"{LAYER0}mlp.fc.weight",
    ),
    "a scale of a module in bf16": (
        lambda path: edit(path, lambda t: put(t, f"{LAYER1}attention.qkv.weights_scaling_factor", torch.ones(1))),
        "extra",
        f"{LAYER1}attention.qkv.weights_scaling_factor",
    ),
    "the KV scale of an excluded layer": (
        lambda path: edit(path, lambda t: t.pop(f"{LAYER1}attention.kv_cache_scaling_factor")),
        "missing",
        f"{LAYER1}attention.kv_cache_scaling_factor",
    ),
    "a module too few in the list": (
        lambda path: list_modules(path, [*EXCLUDED_FROM_QUANTIZATION, *EXCLUDED[1:]]),
        "missing",
        f"{LAYER0}mlp.fc.weights_scaling_factor",
    ),
    "a module too many in the list": (
        lambda path: list_modules(path, [*EXCLUDED_FROM_QUANTIZATION, *EXCLUDED, "*.attention.dense"]),
        "extra",
        f"{LAYER0}attention.dense.activation_scaling_factor",
    ),
    "no list": (lambda path: list_modules(path, None), "dtype", f"{LAYER0}mlp.proj.weight"),
    "routers not in the list": (lambda path: list_modules(path, ["*lm_head", *EXCLUDED]), "config", f"{LAYER1}mlp.router"),
    "head not in the list": (lambda path: list_modules(path, ["*router", *EXCLUDED]), "config", "lm_head"),
}


@pytest.mark.parametrize(("spoil", "kind", "tensor"), STRUCTURE.values(), ids=STRUCTURE.keys())
def test_structure_follows_the_list(spoil: Spoil, kind: str, tensor: str, copy: Path) -> None:
    spoil(copy)
    assert (kind, tensor) in {(finding.kind, finding.tensor) for finding in verify_structure(copy).errors}


def test_a_list_with_half_of_a_product_cannot_be_used(copy: Path) -> None:
    list_modules(copy, [*EXCLUDED_FROM_QUANTIZATION, *EXCLUDED, f"{LAYER1}residual_mlp.fc"])
    [finding] = verify_structure(copy).errors
    assert finding.kind == "config" and "one of residual_mlp.fc and residual_mlp.gate of layer 1" in finding.sentence


@pytest.mark.parametrize("listed", [[*MODELOPT, *EXCLUDED], [*EXCLUDED_FROM_QUANTIZATION, "*.0.mlp", *EXCLUDED[1:], "*.0.mlp.*"]])
def test_other_words_for_the_same_are_no_more_than_a_warning(listed: list[str], copy: Path, tiny_model: Path) -> None:
    list_modules(copy, listed)
    found = verify(copy, tiny_model)
    assert found.passed and {(finding.kind, finding.tensor) for finding in found.findings} <= {
        ("config", "quantization.exclude_modules")
    }


def set_nan(tensors: dict[str, Any]) -> None:
    tensors[f"{LAYER0}mlp.proj.weight"].view(-1)[7:8].fill_(float("nan"))


def test_a_nan_in_a_matrix_in_bf16_is_found_among_values(copy: Path) -> None:
    edit(copy, set_nan, [3])
    assert verify_structure(copy).passed
    assert [(finding.kind, finding.file, finding.tensor) for finding in verify(copy).errors] == [
        (kind, "rank3.safetensors", f"{LAYER0}mlp.proj.weight") for kind in ("not finite", "digest")
    ]


@pytest.mark.parametrize("name", [f"{LAYER0}mlp.fc.weight", f"{LAYER1}attention.qkv.weight", f"{LAYER1}residual_mlp.fc.weight"])
def test_one_bit_is_found(name: str, copy: Path, tiny_model: Path) -> None:
    edit(copy, lambda t: put(t, name, flip(t[name], 4, 0)), [1])
    assert verify_structure(copy).passed
    [finding] = verify(copy).errors
    assert (finding.kind, finding.file, finding.tensor) == ("digest", "rank1.safetensors", name)
    [finding] = verify(copy, tiny_model).errors
    assert (finding.kind, finding.file, finding.tensor) == ("payload", "rank1.safetensors", name)


def test_the_original_is_not_a_quantized_ones(mixed: Path, tiny_model: Path, tiny_samples: Path, tmp_path: Path) -> None:
    quantize(tiny_model, tmp_path / "fp8", calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2)
    shutil.copy(mixed / "rank0.safetensors", tmp_path / "fp8" / "rank0.safetensors")
    assert {"dtype", "missing"} <= {finding.kind for finding in verify_structure(tmp_path / "fp8").errors}


def test_a_torch_engine_of_it(mixed: Path, tmp_path: Path) -> None:
    engine = build_engine(mixed, tmp_path / "engine")
    assert verify(engine).findings == verify(engine, mixed).findings == []
    edit(engine, lambda t: t.pop("layers.1.dense.alpha"), [2])
    assert ("missing", "layers.1.dense.alpha") in {(finding.kind, finding.tensor) for finding in verify(engine).errors}
