"""A checkpoint of eight ranks, with a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.jobs import quantize
from tests.support.small_tokenizer import write_tokenizer


@pytest.fixture(scope="package")
def tp8(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tp8") / "checkpoint"
    model = Path(shutil.copytree(tiny_model, directory.parent / "model"))
    write_tokenizer(model)
    quantize(model, directory, calib_dataset=str(tiny_samples), tp_size=8)
    return directory
