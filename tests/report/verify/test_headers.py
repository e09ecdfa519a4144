"""One rank file against its plan: what is right stays, what is not is a finding with its kind."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from arctic_trt.checkpoint.layout import TensorSpec
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.headers import open_rank_file

PLAN = (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BF16", (4,)), TensorSpec("c", "F32", (1,)))


def test_a_file_as_planned(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16(), "c": torch.ones(1)}, tmp_path / "rank0.safetensors")
    found = Verification()
    file = open_rank_file(tmp_path / "rank0.safetensors", PLAN, found)
    assert file and file.tensors.keys() == {"a", "b", "c"} and found.findings == []


def test_what_differs_is_a_finding_and_is_not_looked_at_further(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 2), "b": torch.ones(4), "d": torch.ones(1)}, tmp_path / "rank0.safetensors")
    found = Verification()
    file = open_rank_file(tmp_path / "rank0.safetensors", PLAN, found)
    assert file and not file.tensors
    assert sorted((item.kind, item.tensor) for item in found.errors) == [
        ("dtype", "b"),
        ("extra", "d"),
        ("missing", "c"),
        ("shape", "a"),
    ]
    assert "a is F32 [3, 2], expected F32 [2, 3]." in [item.sentence for item in found.errors]


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    found = Verification()
    assert open_rank_file(tmp_path / "rank0.safetensors", PLAN, found) is None
    assert [(item.kind, item.file) for item in found.errors] == [("file", "rank0.safetensors")]
