"""Reading and writing safetensors files: the bytes are those of the safetensors library, and half a file is never visible."""

from __future__ import annotations

import ctypes
import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from arctic_trt.checkpoint import tensors as tensors_module
from arctic_trt.checkpoint.header import read_header
from arctic_trt.checkpoint.layout import PAGE_BYTES, TensorSpec, plan_layout
from arctic_trt.checkpoint.tensors import PARTIAL, TORCH_DTYPE, TensorFile, TensorFileWriter, reserve
from arctic_trt.errors import ArcticTrtError, CheckpointError

SPECS = [TensorSpec("fp8", "F8_E4M3", (4, 6)), TensorSpec("bf16", "BF16", (3,)), TensorSpec("f32", "F32", (2, 1))]


def random_bytes(spec: TensorSpec, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 120, (spec.num_bytes,), dtype=torch.uint8, generator=draw).view(TORCH_DTYPE[spec.dtype]).view(spec.shape)
    )


def write_all(path: Path) -> dict[str, Tensor]:
    values = {spec.name: random_bytes(spec) for spec in SPECS}
    writer = TensorFileWriter(path, plan_layout(SPECS, {"format": "pt"}))
    for name, value in reversed(values.items()):
        writer.write(name, value)
    writer.finish()
    return values


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.view(torch.uint8).equal(other.view(torch.uint8))


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    values = write_all(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == values.keys() and all(same_bytes(found[name], values[name]) for name in values)


def test_what_the_safetensors_library_wrote_is_read(tmp_path: Path) -> None:
    values = {spec.name: random_bytes(spec, seed=1) for spec in SPECS}
    save_file(values, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.tensors.keys() == values.keys() and all(same_bytes(file.read(name), values[name]) for name in values)
    file.close()


def test_a_range_of_rows_is_read_alone(tmp_path: Path) -> None:
    values = write_all(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert same_bytes(file.read_rows("fp8", 1, 3), values["fp8"][1:3])
    assert same_bytes(file.read_rows("bf16", 2, None), values["bf16"][2:])
    file.close()


def test_data_begins_on_a_page(tmp_path: Path) -> None:
    write_all(tmp_path / "a.safetensors")
    assert min(item.offset for item in read_header(tmp_path / "a.safetensors").values()) == PAGE_BYTES


@given(
    st.lists(st.tuples(st.sampled_from(sorted(TORCH_DTYPE)), st.lists(st.integers(1, 9), min_size=1, max_size=3)), max_size=20)
)
def test_tensors_lie_one_after_another(entries: list[tuple[str, list[int]]]) -> None:
    specs = [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(entries)]
    layout = plan_layout(specs)
    end = len(layout.header)
    for spec in specs:
        assert layout.offsets[spec.name] == end
        end += spec.num_bytes
    assert layout.total_bytes == end and len(layout.header) % PAGE_BYTES == 0
    assert len(json.loads(layout.header[8:])) == len(specs)


def test_a_name_is_placed_once() -> None:
    with pytest.raises(ValueError, match="fp8 is listed twice"):
        plan_layout([SPECS[0], SPECS[0]])


def test_equal_parts_are_written_in_their_places(tmp_path: Path) -> None:
    spec = TensorSpec("experts", "BF16", (3, 2, 4))
    whole = random_bytes(spec)
    writer = TensorFileWriter(tmp_path / "a.safetensors", plan_layout([spec]))
    for index in (2, 0, 1):
        writer.write("experts", whole[index], index)
    writer.finish()
    assert same_bytes(load_file(tmp_path / "a.safetensors")["experts"], whole)


def test_reads_and_writes_longer_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors_module, "CHUNK_BYTES", 5)
    values = write_all(tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    assert all(same_bytes(file.read(name), values[name]) for name in values)
    file.close()


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    writer = TensorFileWriter(path, plan_layout(SPECS))
    writer.write("bf16", random_bytes(SPECS[1]))
    with pytest.raises(RuntimeError, match=r"a\.safetensors: fp8 has 0 of 24 bytes"):
        writer.finish()
    assert not path.exists()
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "index"),
    [(torch.zeros(4, 6), 0), (torch.zeros(4, 7).bfloat16(), 0), (torch.zeros(24, dtype=torch.float8_e4m3fn), 1)],
    ids=["wrong dtype", "too long", "beyond the end"],
)
def test_a_part_that_does_not_belong_is_refused(tmp_path: Path, part: Tensor, index: int) -> None:
    writer = TensorFileWriter(tmp_path / "a.safetensors", plan_layout(SPECS))
    with pytest.raises(ValueError, match="the file expects"):
        writer.write("fp8", part, index)
    writer.abandon()


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_all(path)
    file = TensorFile(path)
    os.truncate(path, file.tensors["f32"].offset + 3)
    with pytest.raises(CheckpointError, match=r"a\.safetensors ended inside f32"):
        file.read("f32")
    file.close()


def test_a_tensor_is_read_into_memory_that_is_there(tmp_path: Path) -> None:
    values = write_all(tmp_path / "a.safetensors")
    file, memory = TensorFile(tmp_path / "a.safetensors"), torch.full((100,), 7, dtype=torch.uint8)
    for name, value in values.items():
        found = file.read(name, memory)
        assert same_bytes(found, value) and found.data_ptr() == memory.data_ptr()
        assert (memory[value.nbytes :] == 7).all() or name != "fp8", "nothing is written beyond its end"
    file.expect("fp8")
    file.close()


@pytest.mark.parametrize("named", [False, True], ids=["partial", "already named"])
def test_an_unfinished_file_is_continued(tmp_path: Path, named: bool) -> None:
    path, values = tmp_path / "a.safetensors", {spec.name: random_bytes(spec) for spec in SPECS}
    first = TensorFileWriter(path, plan_layout(SPECS, {"format": "pt"}))
    first.write("fp8", values["fp8"])
    first.sync()
    first.close()
    if named:
        path.with_name(path.name + PARTIAL).rename(path)
    second = TensorFileWriter(path, plan_layout(SPECS, {"format": "pt"}), resume=True)
    assert not path.exists(), "a file under its own name is complete"
    second.assume("fp8")
    for name in ("bf16", "f32"):
        second.write(name, values[name])
    second.finish()
    found = load_file(path)
    assert all(same_bytes(found[name], values[name]) for name in values)


def test_several_writers_share_a_file(tmp_path: Path) -> None:
    path, spec = tmp_path / "a.safetensors", TensorSpec("experts", "BF16", (4, 2, 3))
    whole = random_bytes(spec)
    writers = [TensorFileWriter(path, plan_layout([spec]), resume=bool(rank)) for rank in (0, 1)]
    for index in range(4):
        writers[index % 2].write("experts", whole[index], index)
    with pytest.raises(RuntimeError, match="experts has 24 of 48 bytes"):
        writers[0].finish()
    writers[0].finish([writer.written for writer in writers])
    writers[1].close()
    assert same_bytes(load_file(path)["experts"], whole)


def test_there_is_nothing_to_continue(tmp_path: Path) -> None:
    with pytest.raises(ArcticTrtError, match=r"a\.safetensors cannot be written: No such file"):
        TensorFileWriter(tmp_path / "a.safetensors", plan_layout(SPECS), resume=True)


def test_space_is_reserved_before_anything_is_written(tmp_path: Path) -> None:
    writer = TensorFileWriter(tmp_path / "a.safetensors", plan_layout([TensorSpec("big", "F32", (1 << 18,))]))
    status = (tmp_path / f"a.safetensors{PARTIAL}").stat()
    assert status.st_size == writer.layout.total_bytes
    assert status.st_blocks * 512 >= status.st_size or not os.statvfs(tmp_path).f_blocks
    writer.abandon()


@pytest.mark.parametrize(("code", "refused"), [(errno.EOPNOTSUPP, False), (errno.ENOSYS, False), (errno.ENOSPC, True)])
def test_where_space_cannot_be_reserved(tmp_path: Path, code: int, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not know how gets a file of the right size; one that is full is full."""

    class Libc:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(tensors_module, "_libc", Libc)
    with (tmp_path / "a").open("w+b") as file:
        if refused:
            with pytest.raises(OSError, match="No space left"):
                reserve(file.fileno(), 1000)
        else:
            reserve(file.fileno(), 1000)
            assert os.fstat(file.fileno()).st_size == 1000


def test_parts_may_be_written_side_by_side(tmp_path: Path) -> None:
    spec = TensorSpec("experts", "F32", (64, 50))
    whole = random_bytes(spec)
    writer = TensorFileWriter(tmp_path / "a.safetensors", plan_layout([spec]))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda index: writer.write("experts", whole[index], index), range(64)))
    assert writer.written["experts"] == spec.num_bytes and writer.bytes_written == writer.layout.total_bytes
    writer.finish()
    assert same_bytes(load_file(tmp_path / "a.safetensors")["experts"], whole)


@pytest.mark.parametrize("call", ["open", "pwrite", "fdatasync", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "a.safetensors"

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        writer = TensorFileWriter(path, plan_layout(SPECS))
        try:
            for spec in SPECS:
                writer.write(spec.name, random_bytes(spec))
            writer.sync()
            writer.finish()
        except BaseException:
            writer.abandon()
            raise

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ArcticTrtError, match=r"a\.safetensors cannot be written: No space left on device") as caught:
        write()
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
