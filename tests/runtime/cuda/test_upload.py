"""Tensors arrive as they are, in parts."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.runtime.cuda.upload import Uploader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("shape", [(), (1,), (7, 5), (3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_what_arrives_is_what_was_sent(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, told = torch.randn(shape).to(dtype), []
    held = Uploader(DEVICE, told.append, buffer_bytes=16).hold(tensor)
    assert (held.dtype, held.shape, held.device.type) == (dtype, tensor.shape, DEVICE.type)
    assert (
        torch.equal(held.cpu().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        and held.data_ptr() != tensor.data_ptr()
    )
    assert sum(told) == tensor.nbytes and max(told) <= 16


def test_tensors_that_are_no_whole_memory_arrive_too() -> None:
    tensor = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(Uploader(DEVICE).hold(tensor).cpu(), tensor)
