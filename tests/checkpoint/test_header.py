"""Headers are checked against the bytes that are there, before any work starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arctic_trt.checkpoint.header import read_header
from arctic_trt.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4975023880\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": torch.zeros(4, 4).bfloat16(), "b": torch.zeros(4)}, tmp_path / "m.safetensors", {"format": "pt"})
    return tmp_path / "m.safetensors"


def with_header(table: object, data: bytes = b"") -> bytes:
    return with_text(json.dumps(table).encode(), data)


def with_text(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "BF16", shape: object = (2,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_a_good_file_lists_its_tensors(path: Path) -> None:
    found = read_header(path)
    assert {name: (item.spec.dtype, item.spec.shape) for name, item in found.items()} == {
        "a": ("BF16", (4, 4)),
        "b": ("F32", (4,)),
    }


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda data: b"", "is truncated: a safetensors file has at least 10, but the file has 0 bytes"),
        (lambda data: data[:5], "is truncated: a safetensors file has at least 10, but the file has 5 bytes"),
        (lambda data: data[:8], "is truncated"),
        (lambda data: data[:40], "is truncated: its header claims"),
        (lambda data: data[:-1], "is truncated: its header describes"),
        (lambda data: data + b"\0", "but its header describes"),
        (lambda data: POINTER, f"is a Git-LFS pointer of {len(POINTER)} bytes, not the weights"),
        (lambda data: b"<!DOCTYPE html><html>Not found</html>", "is truncated: its header claims"),
        (lambda data: (2).to_bytes(8, "little") + b"{]", "malformed safetensors header"),
        (lambda data: with_header([]), "malformed safetensors header"),
        (lambda data: with_header({"a": 1}), "malformed safetensors header"),
        (lambda data: with_header({"a": {"dtype": "BF16", "shape": [2]}}, b"\0" * 4), "malformed safetensors header"),
        (lambda data: with_header(entry(offsets=(0, 3)), b"\0" * 3), "spans 3 bytes, its shape and dtype need 4"),
        (lambda data: with_header(entry(offsets=(-4, 0))), "malformed safetensors header"),
        (lambda data: with_header(entry() | {"b": entry()["a"]}, b"\0" * 4), "b leaves a gap or an overlap"),
        (lambda data: with_header(entry(offsets=(2, 6)), b"\0" * 6), "a leaves a gap or an overlap"),
        (lambda data: with_header(entry(shape=["x"]), b"\0" * 4), "malformed safetensors header"),
        (lambda data: with_text(b'{"a": {}, "a": {}}'), "a is listed twice"),
        (lambda data: with_header(entry("F16"), b"\0" * 4), "holds a as F16, expected one of"),
    ],
)
def test_a_bad_file_is_one_sentence_that_names_it(path: Path, spoil: Callable[[bytes], bytes], complaint: str) -> None:
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and complaint in str(caught.value)


def test_every_truncation_of_a_file_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"m\.safetensors is truncated"):
            read_header(path)


def test_an_absent_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors does not exist"):
        read_header(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        read_header(tmp_path)
