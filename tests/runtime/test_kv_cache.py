"""What goes into the cache comes out again, rounded to e4m3 where the engine says so."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.runtime.kernels import CpuKernels, rounded
from arctic_trt.runtime.kv_cache import KvCache

SCALE = torch.tensor([0.5])


def make(*, fp8: bool) -> KvCache:
    return KvCache(num_layers=2, kv_heads=3, head_dim=4, fp8=fp8, kernels=CpuKernels())


@pytest.mark.parametrize("fp8", [True, False])
def test_positions_come_back_in_order(fp8: bool) -> None:
    cache, scale = make(fp8=fp8), SCALE if fp8 else None
    keys, values = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    cache.allocate(7, 6)
    for layer in range(2):
        for start, end in ((0, 4), (4, 5), (5, 6)):
            cache.append(7, layer, start, (layer + 1) * keys[:, start:end], values[:, start:end], scale)
    for layer in range(2):
        found_keys, found_values = cache.view(7, layer, 5, scale)
        factor = 1.0 if scale is None else SCALE
        torch.testing.assert_close(found_keys, rounded((layer + 1) * keys[:, :5], scale) * factor)
        torch.testing.assert_close(found_values, rounded(values[:, :5], scale) * factor)


def test_sequences_come_and_go() -> None:
    cache = make(fp8=True)
    cache.allocate(1, 4)
    cache.allocate(2, 4)
    with pytest.raises(ValueError, match="sequence 2"):
        cache.allocate(2, 4)
    cache.free(1)
    assert len(cache) == 1
    cache.allocate(1, 9)
    assert len(cache) == 2
    with pytest.raises(KeyError):
        cache.free(3)
    cache.clear()
    assert len(cache) == 0
