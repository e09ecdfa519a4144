"""Tensors where they lie in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arctic_trt.checkpoint.mapped import MappedFile
from arctic_trt.errors import CheckpointError


def test_tensors_are_those_of_the_file_and_stay_when_it_goes(tmp_path: Path) -> None:
    tensors = {
        "codes": torch.arange(6, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 3),
        "norm": torch.arange(5, dtype=torch.bfloat16),
        "scale": torch.tensor([0.25]),
    }
    save_file(tensors, tmp_path / "rank0.safetensors")
    file = MappedFile(tmp_path / "rank0.safetensors")
    found = {name: file.read(name) for name in tensors}
    (tmp_path / "rank0.safetensors").unlink()
    del file
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].view(torch.uint8).equal(tensor.view(torch.uint8))


def test_an_offset_that_is_no_multiple_of_the_item_size(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}'
    values = torch.tensor([1.5, -2.0])
    data = bytes(3) + values.numpy().tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert MappedFile(tmp_path / "x").read("b").equal(values)


def test_reading_does_not_copy(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4096)}, tmp_path / "x")
    file = MappedFile(tmp_path / "x")
    assert file.read("x").data_ptr() == file.read("x").data_ptr()


def test_a_truncated_file(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(4096)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        MappedFile(tmp_path / "x")
