"""The tasks of ``tests/data/lm_eval`` for lm-evaluation-harness, with data sets from files beside them and nothing from a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "tests" / "data" / "lm_eval"
NAMES = ("choice", "answer", "text")


def task(name: str, cache_dir: Path, **changes: Any) -> dict[str, Any]:
    """A task as the harness takes it; what ``datasets`` makes of its file goes to ``cache_dir``."""
    config = yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text())
    files = {split: str(ROOT / file) for split, file in config["dataset_kwargs"]["data_files"].items()}
    return {**config, "dataset_kwargs": {"data_files": files, "cache_dir": str(cache_dir)}, **changes}


def rows(name: str) -> list[dict[str, Any]]:
    """The documents of a task."""
    file = yaml.safe_load((DIRECTORY / f"{name}.yaml").read_text())["dataset_kwargs"]["data_files"]["test"]
    return [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
