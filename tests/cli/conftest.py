"""Engines of the tiny model, built once a process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engines import build_engine
from tests.support.jobs import quantize
from tests.support.small_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def engines(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The engine of a number of ranks, with a tokenizer."""
    work_dir = tmp_path_factory.mktemp("engines")

    def engine(tp_size: int) -> Path:
        directory = work_dir / f"engine{tp_size}"
        if not directory.exists():
            checkpoint = work_dir / f"checkpoint{tp_size}"
            quantize(tiny_model, checkpoint, calib_dataset=str(tiny_samples), tp_size=tp_size)
            write_tokenizer(checkpoint)
            build_engine(checkpoint, directory)
        return directory

    return engine
