"""Result files: shapes, padding, and never half a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arctic_trt.errors import UsageError
from arctic_trt.runtime.completion import Completion
from arctic_trt.runtime.outputs import PromptLogits, check_writable, padded_rows, replacing, write_csv, write_npy

COMPLETIONS = [
    Completion(prompt=(1, 2, 3), token_ids=(4, 5), text="", finish_reason="length"),
    Completion(prompt=(6,), token_ids=(7,), text="", finish_reason="stop"),
]


def test_npy_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    rows = padded_rows(COMPLETIONS, 9)
    write_npy(tmp_path / "o.npy", rows)
    write_csv(tmp_path / "o.csv", rows)
    written = np.load(tmp_path / "o.npy")
    assert written.dtype == np.int32
    assert written.tolist() == [[[1, 2, 3, 4, 5]], [[6, 7, 9, 9, 9]]]
    assert (tmp_path / "o.csv").read_text() == "1,2,3,4,5\n6,7,9,9,9\n"


def test_samples_of_a_prompt_lie_where_beams_would(tmp_path: Path) -> None:
    rows = padded_rows([COMPLETIONS[0]] * 2 + [COMPLETIONS[1]] * 2, 9)
    write_npy(tmp_path / "o.npy", rows, 2)
    assert np.load(tmp_path / "o.npy").tolist() == [[[1, 2, 3, 4, 5]] * 2, [[6, 7, 9, 9, 9]] * 2]


def test_logits_are_zero_beyond_a_shorter_prompt(tmp_path: Path) -> None:
    logits = PromptLogits(tmp_path / "l.npy", [(1, 2, 3), (6,)], 4)
    logits.write(0, 0, torch.ones(1, 4))
    logits.write(1, 0, torch.full((1, 4), 3.0))
    logits.write(0, 1, torch.full((2, 4), 2.0))
    assert not (tmp_path / "l.npy").exists()
    logits.finish()
    written = np.load(tmp_path / "l.npy")
    assert written.dtype == np.float32 and written.shape == (2, 3, 4)
    assert written[:, :, 0].tolist() == [[1, 2, 2], [3, 0, 0]]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    PromptLogits(tmp_path / "l.npy", [(1,)], 4).abandon()
    (tmp_path / "kept.csv").write_text("old")
    with pytest.raises(ValueError, match="halfway"), replacing(tmp_path / "kept.csv", "w") as file:
        file.write("new")
        raise ValueError("halfway")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.csv"]
    assert (tmp_path / "kept.csv").read_text() == "old"


def test_impossible_places_are_refused_before_any_work(tmp_path: Path) -> None:
    check_writable("--output_npy", None)
    check_writable("--output_npy", tmp_path / "o.npy")
    with pytest.raises(UsageError, match=r"--output_npy .* is a directory"):
        check_writable("--output_npy", tmp_path)
    with pytest.raises(UsageError, match="absent does not exist"):
        check_writable("--output_csv", tmp_path / "absent" / "o.csv")
