"""Recipes: flags over a YAML file over defaults, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from arctic_trt.errors import UsageError
from arctic_trt.quantize.data import BUILT_IN, NAMED
from arctic_trt.recipes import PlanRecipe, QuantizeRecipe, read_yaml, resolve

CALIB = sorted((Path(__file__).parents[2] / "calib").glob("*.yaml"))
REQUIRED = {"model_dir": Path("model"), "output_dir": Path("out")}


def test_flags_that_were_not_given_do_not_hide_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("tp_size: 4\nseed: 7\noverwrite: true\n")
    found = resolve(QuantizeRecipe, {**REQUIRED, "tp_size": None, "seed": 9, "overwrite": None}, path)
    assert (found.tp_size, found.seed, found.overwrite, found.batch_size) == (4, 9, True, 1)


def test_an_empty_file_is_an_empty_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# nothing\n")
    assert resolve(QuantizeRecipe, REQUIRED, tmp_path / "recipe.yaml") == QuantizeRecipe(**REQUIRED)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        QuantizeRecipe(**REQUIRED).tp_size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "in_file", "complaint"),
    [
        ({"tp_size": 0}, "", "--tp_size 0 is not valid: input should be greater than or equal to 1"),
        ({}, "tp_size: 0", "recipe.yaml has tp_size 0 is not valid"),
        ({"tp_size": 0}, "tp_size: 4", "--tp_size 0 is not valid"),
        ({"model_dir": None}, "", "--model_dir is required"),
        ({}, "moe_tpsize: 1", "has the unknown key 'moe_tpsize'. Did you mean 'moe_tp_size'?"),
    ],
)
def test_a_problem_names_where_it_comes_from(given: dict[str, Any], in_file: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(in_file)
    with pytest.raises(UsageError) as caught:
        resolve(QuantizeRecipe, {**REQUIRED, **given}, path)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("qformat", "kv_cache_dtype", "fp8"),
    [("fp8", None, True), ("fp8", "fp8", True), ("fp8", "none", False), ("full_prec", None, False), ("full_prec", "none", False)],
)
def test_an_fp8_checkpoint_has_an_fp8_cache_unless_told_otherwise(qformat: Any, kv_cache_dtype: Any, fp8: bool) -> None:
    assert QuantizeRecipe(**REQUIRED, qformat=qformat, kv_cache_dtype=kv_cache_dtype).kv_fp8 is fp8


@pytest.mark.parametrize("path", CALIB, ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_valid(path: Path) -> None:
    recipe = resolve(QuantizeRecipe, REQUIRED, path)
    assert read_yaml(path).items() <= recipe.model_dump().items(), "nothing in it is silently changed"
    assert recipe.calib_dataset in {*BUILT_IN, *NAMED}
    assert resolve(PlanRecipe, {"model": Path("model")}, path).qformat == recipe.qformat
    assert path.read_text().startswith("# "), "it says what it is for"


def test_the_recipe_called_fp8_is_the_default() -> None:
    assert {path.stem for path in CALIB} == {"bf16", "fp8", "fp8-official", "fp8-thorough"}
    [fp8] = [path for path in CALIB if path.stem == "fp8"]
    default = QuantizeRecipe(**REQUIRED)
    found = resolve(QuantizeRecipe, REQUIRED, fp8)
    assert found.model_copy(update={"kv_cache_dtype": None}) == default and found.kv_fp8 == default.kv_fp8


@pytest.mark.parametrize("kind", [QuantizeRecipe, PlanRecipe])
@pytest.mark.parametrize(
    ("in_file", "complaint"),
    [
        ("exclude_modules: ['*.mlp']\nqformat: full_prec", "--exclude_modules keeps parts of an FP8 checkpoint in bf16"),
        ("exclude_modules: '*.mlp'", "recipe.yaml has exclude_modules '\\*.mlp' is not valid: input should be a valid tuple"),
        ("exclude_modules: [3]", "recipe.yaml has exclude_modules 3 is not valid: input should be a valid string"),
    ],
)
def test_exclusions_are_a_list_of_patterns_of_an_fp8_checkpoint(kind: Any, in_file: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(in_file)
    given = {**REQUIRED, "model": Path("model")}
    with pytest.raises(UsageError, match=complaint):
        resolve(kind, {name: value for name, value in given.items() if name in kind.model_fields}, path)


@pytest.mark.parametrize("kind", [QuantizeRecipe, PlanRecipe])
def test_an_fp8_cache_needs_scales(kind: Any) -> None:
    given = {**REQUIRED, "model": Path("model"), "qformat": "full_prec", "kv_cache_dtype": "fp8"}
    flags = {name: value for name, value in given.items() if name in kind.model_fields}
    with pytest.raises(UsageError, match="--kv_cache_dtype fp8 needs scales, which --qformat full_prec does not calibrate"):
        resolve(kind, flags)
