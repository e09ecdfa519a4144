"""What an evaluation reports, and where."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from arctic_trt.recipes import EvaluateRecipe
from arctic_trt.report.evaluate.plan import plan_evaluation
from arctic_trt.report.evaluate.run import evaluate
from tests.report.evaluate.conftest import LENGTHS
from tests.support.jobs import quantize, read_ranks

Make = Callable[..., dict[str, object]]


@pytest.fixture
def checkpoint(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(checkpoints(tp_size=2), tmp_path / "checkpoint"))


@pytest.fixture
def result(data: Path, tmp_path: Path) -> Make:
    def run(path: Path, **recipe: object) -> dict[str, object]:
        plan = plan_evaluation(EvaluateRecipe(path=path, data=str(data), work_dir=tmp_path / "work", **recipe))
        try:
            return evaluate(plan)
        finally:
            plan.close()

    return run


def test_a_checkpoint_keeps_its_result(result: Make, checkpoint: Path, model: Path, data: Path) -> None:
    found = result(checkpoint, against=model)
    assert json.loads((checkpoint / "report" / "eval.json").read_text()) == found
    assert found["data"] == {
        "path": str(data),
        "samples": len(LENGTHS),
        "tokens": sum(LENGTHS),
        "predicted_tokens": sum(LENGTHS) - len(LENGTHS),
        "digest": found["data"]["digest"],  # type: ignore[index]
    }
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))  # type: ignore[arg-type]
    assert found["reference"]["perplexity"] != found["perplexity"]  # type: ignore[index]
    assert len(found["hidden_error"]) == 2 and 0 < found["kl_mean"] < found["kl_p99"] <= found["kl_max"]  # type: ignore
    assert found["sensitivity"] is None and found["resumed_layers"] == 0 and found["hidden_states_on_disk"] is False


def test_a_model_keeps_nothing(result: Make, model: Path) -> None:
    before = sorted(model.rglob("*"))
    found = result(model)
    assert found["reference"] is found["kl_mean"] is found["hidden_error"] is None and found["path"] == str(model)
    assert sorted(model.rglob("*")) == before


def test_a_checkpoint_that_cannot_be_written_to(
    result: Make, checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("arctic_trt.report.evaluate.run.save_record", refuse)
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        assert result(checkpoint)["perplexity"]
    assert "eval.json is not written: Read-only file system." in caplog.text


def test_a_sensitivity(result: Make, checkpoint: Path, model: Path, data: Path) -> None:
    found = result(checkpoint, against=model, sensitivity=True, size_budget="20%")["sensitivity"]
    assert isinstance(found, dict) and found["recipe"] == str(checkpoint / "report" / "sensitivity.yaml")
    kl = [site["kl_mean"] for site in found["sites"]]
    assert len(kl) == 4 and kl == sorted(kl, reverse=True)
    assert 0 < found["spent_bytes"] <= found["budget_bytes"] and len(found["units"]) == 7
    size = sum(path.stat().st_size for path in checkpoint.glob("rank*"))
    assert found["budget_bytes"] == int(0.2 * size)
    text = (checkpoint / "report" / "sensitivity.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert text.startswith("# Keeps in bf16 what costs most. Expected KL ")
    assert recipe["model_dir"] == str(model) and recipe["calib_dataset"] == str(data), "as the checkpoint's own report says"
    kept = [unit for unit in found["units"] if unit["kept"]]
    assert sum(unit["bytes"] for unit in kept) == found["spent_bytes"] and bool(recipe["exclude_modules"]) == any(
        unit["layer"] is not None for unit in kept
    )


def test_the_recipe_makes_the_checkpoint_that_was_chosen(result: Make, checkpoint: Path, model: Path, tmp_path: Path) -> None:
    before = result(
        checkpoint, against=model, sensitivity=True, size_budget="20%", sites=["attention", "residual_mlp", "experts"]
    )
    found = before["sensitivity"]
    assert isinstance(found, dict)
    recipe = yaml.safe_load(Path(found["recipe"]).read_text())
    quantize(output_dir=tmp_path / "mixed", **recipe)
    sizes = [sum(t.nbytes for rank in read_ranks(path) for t in rank.values()) for path in (checkpoint, tmp_path / "mixed")]
    assert sizes[1] - sizes[0] == found["spent_bytes"] > 0
    after = result(tmp_path / "mixed", against=model)
    assert 0 < after["kl_mean"] < before["kl_mean"]  # type: ignore[operator]


def test_a_recipe_elsewhere_and_of_some_sites(
    result: Make, checkpoint: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "report" / "quantize.json").unlink()
    target = tmp_path / "new" / "recipe.yaml"
    with caplog.at_level(logging.WARNING, "arctic_trt"):
        found = result(checkpoint, against=model, sensitivity=True, recipe_file=target, sites=["residual_mlp"])["sensitivity"]
    recipe = yaml.safe_load(target.read_text())
    assert all(".residual_mlp." in name for name in recipe["exclude_modules"]) and recipe["exclude_modules"]
    assert recipe["kv_cache_dtype"] == "fp8" and "calib_dataset" not in recipe
    assert "the new recipe calibrates with the default data" in caplog.text
    assert not (checkpoint / "report" / "sensitivity.yaml").exists() and found["recipe"] == str(target)  # type: ignore[index]
