"""CRC-32 of tensors that were written in parts, in any order, by whoever."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.checkpoint.digests import crc_text, file_crc, join_crcs, tensor_crcs
from arctic_trt.checkpoint.layout import TensorSpec, plan_layout
from arctic_trt.checkpoint.tensors import TensorFileWriter, bytes_of


@given(st.binary(min_size=1, max_size=300), st.integers(1, 40))
def test_parts_make_the_whole(data: bytes, part_bytes: int) -> None:
    data = data * part_bytes
    parts = [data[begin : begin + part_bytes] for begin in range(0, len(data), part_bytes)]
    assert join_crcs(map(zlib.crc32, parts), part_bytes) == zlib.crc32(data)


def test_parts_of_megabytes() -> None:
    data = torch.arange(3 << 20, dtype=torch.int32).numpy().tobytes()
    assert join_crcs([zlib.crc32(data), zlib.crc32(data)], len(data)) == zlib.crc32(data + data)


@given(st.permutations(range(6)), st.data())
def test_neither_order_nor_process_matters(order: list[int], data: st.DataObject) -> None:
    parts = [bytes([index, 7, index]) for index in range(6)]
    written: list[dict[str, dict[int, int]]] = [{}, {}, {}]
    for index in order:
        process = data.draw(st.integers(0, 2))
        written[process].setdefault("w", {})[index] = zlib.crc32(parts[index])
    assert tensor_crcs(written, {"w": 18}) == {"w": crc_text(zlib.crc32(b"".join(parts)))}


def test_parts_that_change_places_change_the_digest() -> None:
    assert join_crcs([1, 2], 8) != join_crcs([2, 1], 8)


def test_a_writer_knows_what_it_has_written(tmp_path: Path) -> None:
    values = torch.randn(4, 3)
    writer = TensorFileWriter(tmp_path / "a", plan_layout([TensorSpec("x", "F32", (4, 3)), TensorSpec("y", "F32", (1,))]))
    for row in (2, 0, 3, 1):
        writer.write("x", values[row], row)
    assert tensor_crcs([writer.take_crcs()], {"x": 48}) == {"x": crc_text(zlib.crc32(bytes_of(values)))}
    writer.write("y", torch.zeros(1))
    assert tensor_crcs([writer.take_crcs()], {"y": 4}) == {"y": crc_text(zlib.crc32(bytes(4)))}
    assert writer.take_crcs() == {}
    writer.abandon()


def test_a_crc_is_written_as_everybody_writes_it(tmp_path: Path) -> None:
    (tmp_path / "check").write_bytes(b"123456789")
    assert file_crc(tmp_path / "check") == "cbf43926" and crc_text(5) == "00000005"
