"""A model, text for it, and checkpoints made of it; nobody may change them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt.recipes import EvaluateRecipe
from arctic_trt.report.evaluate.job import Evaluation, run_evaluation
from arctic_trt.report.evaluate.plan import plan_evaluation
from tests.support.checkpoints import TINY, Config, random_checkpoint, random_ids, write_samples
from tests.support.jobs import quantize

EVALUATED: Config = {**TINY, "max_position_embeddings": 64, "vocab_size": 300}
LENGTHS = (21, 21, 40, 7)
Evaluate = Callable[..., Evaluation]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("evaluated") / "model", EVALUATED, seed=3)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated") / "data.jsonl"
    return write_samples(path, random_ids(EVALUATED["vocab_size"], LENGTHS, seed=8))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, model: Path, data: Path) -> Callable[..., Path]:
    """The checkpoint of a recipe, made once."""
    directory = tmp_path_factory.mktemp("checkpoints")

    def make(**recipe: object) -> Path:
        path = directory / "-".join(f"{key}{value}" for key, value in recipe.items())
        if not path.exists():
            quantize(model, path, calib_dataset=str(data), **recipe)
        return path

    return make


@pytest.fixture
def evaluated(data: Path, tmp_path: Path) -> Evaluate:
    """What an evaluation finds."""

    def run(path: Path, **recipe: object) -> Evaluation:
        plan = plan_evaluation(EvaluateRecipe(path=path, **{"data": str(data), "work_dir": tmp_path / "work", **recipe}))
        try:
            return run_evaluation(plan)
        finally:
            plan.close()

    return run
