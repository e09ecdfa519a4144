"""The fingerprint changes with everything that changes a byte of the output, and with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.quantize import fingerprint as module
from arctic_trt.quantize.fingerprint import fingerprint
from arctic_trt.recipes import QuantizeRecipe
from tests.support.checkpoints import SMALL, random_checkpoint
from tests.support.jobs import Job

SAMPLES = [[1, 2, 3], [4]]
NEUTRAL = {
    "model_dir": Path("elsewhere"),
    "output_dir": Path("elsewhere"),
    "calib_dataset": "elsewhere.jsonl",
    "dtype": "auto",
    "seed": 5,
    "workers": 7,
    "memory_budget": "8GiB",
    "overwrite": True,
}
TELLING = {
    "qformat": "full_prec",
    "kv_cache_dtype": "none",
    "exclude_modules": ("*.mlp",),
    "calib_size": 3,
    "calib_max_seq_length": 3,
    "batch_size": 2,
    "calibrator": "modelopt",
    "calib_algorithm": "mse",
    "device": "cuda",
}
MAPPED = {"tp_size", "pp_size", "moe_tp_size", "moe_ep_size"}


def of(
    model_dir: Path, samples: list[list[int]] = SAMPLES, mapping: dict[str, int] | None = None, **recipe: Any
) -> dict[str, Any]:
    source = HfCheckpoint(model_dir)
    found = fingerprint(
        QuantizeRecipe(**{"model_dir": model_dir, "output_dir": Path("out"), **recipe}),
        source,
        plan_mapping(source.config, **{"tp_size": 2, **(mapping or {})}),
        samples,
    )
    source.close()
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    assert one.keys() == other.keys()
    return {key for key in one if one[key] != other[key]}


def test_every_field_of_a_recipe_is_considered() -> None:
    assert {*NEUTRAL, *TELLING, *MAPPED} == QuantizeRecipe.model_fields.keys()


@pytest.mark.parametrize(("field", "value"), NEUTRAL.items(), ids=NEUTRAL.keys())
def test_what_changes_no_byte_does_not_count(field: str, value: object, small_model: Path) -> None:
    expected = of(small_model)
    source = HfCheckpoint(small_model)
    recipe = QuantizeRecipe(**{"model_dir": small_model, "output_dir": Path("out"), field: value})
    assert fingerprint(recipe, source, plan_mapping(source.config, tp_size=2), SAMPLES) == expected
    source.close()


@pytest.mark.parametrize(("field", "value"), TELLING.items(), ids=TELLING.keys())
def test_what_may_change_a_byte_counts_by_its_name(field: str, value: object, small_model: Path) -> None:
    base = {"calibrator": "modelopt"} if field == "calib_algorithm" else {}
    changed = differing(of(small_model, **base), of(small_model, **base, **{field: value}))
    assert changed == ({"qformat", "kv_cache_dtype"} if field == "qformat" else {field})


@pytest.mark.parametrize(
    ("mapping", "names"),
    [
        ({"tp_size": 4}, {"tp_size", "moe_tp_size"}),
        ({"pp_size": 2}, {"pp_size"}),
        ({"moe_ep_size": 2}, {"moe_ep_size", "moe_tp_size"}),
    ],
)
def test_the_mapping_counts(mapping: dict[str, int], names: set[str], small_model: Path) -> None:
    assert differing(of(small_model), of(small_model, mapping=mapping)) == names


@pytest.mark.parametrize("samples", [[[1, 2, 3]], [[4], [1, 2, 3]], [[1, 2, 3, 4]], [[1, 2], [3, 4]], []])
def test_the_calibration_ids_count(samples: list[list[int]], small_model: Path) -> None:
    assert differing(of(small_model), of(small_model, samples)) == {"calibration_ids"}


def test_the_version_counts(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(small_model)
    monkeypatch.setattr(module, "__version__", "0.0.0")
    assert differing(before, of(small_model)) == {"version"}


def test_where_the_checkpoint_lies_does_not_count(small_model: Path, tmp_path: Path) -> None:
    assert of(Path(shutil.copytree(small_model, tmp_path / "copy"))) == of(small_model)


def rename_shard(job: Job) -> None:
    old, new = "model-00001-of-00002.safetensors", "model-1.safetensors"
    (job.model_dir / old).rename(job.model_dir / new)
    job.edit_index(lambda names: names.update({name: new for name, shard in names.items() if shard == old}))


def add_metadata(job: Job) -> None:
    path = job.home("lm_head.weight")
    save_file({name: torch.clone(tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt", "more": "1"})


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda job: job.edit_config(lambda raw: raw.update(rope_theta=5000)), {"config"}),
        (lambda job: job.edit_config(lambda raw: raw.update(use_cache=False)), set()),
        (rename_shard, {"checkpoint_headers"}),
        (lambda job: random_checkpoint(job.model_dir, SMALL, shards=3), {"checkpoint_headers"}),
        (add_metadata, {"checkpoint_headers"}),
    ],
    ids=["config", "irrelevant key", "renamed shard", "other shards", "header"],
)
def test_the_checkpoint_counts(change: Callable[[Job], object], names: set[str], job: Job) -> None:
    before = of(job.model_dir)
    change(job)
    assert differing(before, of(job.model_dir)) == names
