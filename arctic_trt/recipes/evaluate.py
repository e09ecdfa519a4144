"""What ``arctic-trt eval`` is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from arctic_trt.recipes.base import Recipe


class EvaluateRecipe(Recipe):
    """An evaluation; field names are the flags of ``arctic-trt eval`` and the keys of its YAML, ``path`` its argument."""

    path: Path
    against: Path | None = None
    data: str = "heldout"
    num_samples: int = Field(1_000_000, ge=1)
    max_seq_length: int | None = Field(None, ge=2)
    batch_size: int = Field(1, ge=1)
    tokenizer_dir: Path | None = None
    sensitivity: bool = False
    size_budget: str = "10%"
    sites: tuple[Literal["attention", "residual_mlp", "experts", "kv_cache"], ...] = ()
    recipe_file: Path | None = None
    work_dir: Path | None = None
    memory_budget: str | None = None
