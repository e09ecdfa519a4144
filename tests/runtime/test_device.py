"""Which device a rank gets."""

from __future__ import annotations

import pytest
import torch

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.device import find_device, plan_device

HOPPER = (9, 0)


@pytest.mark.parametrize("asked", ["auto", "cuda"])
def test_each_rank_of_a_host_has_its_own_gpu(asked: str) -> None:
    assert [plan_device(asked, 8, HOPPER, rank, 8) for rank in (0, 7)] == [torch.device("cuda", 0), torch.device("cuda", 7)]


def test_the_cpu_is_taken_when_asked_for() -> None:
    assert plan_device("cpu", 8, HOPPER, 0, 1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("gpus", "capability", "ranks", "said"),
    [
        (0, None, 1, "this machine has no CUDA device that torch can use"),
        (4, HOPPER, 8, "8 ranks on this host need a GPU each, it has 4"),
        (8, (8, 0), 8, "the GPUs have compute capability 8.0, FP8 needs 8.9"),
    ],
)
def test_without_what_it_needs_auto_takes_the_cpu_and_cuda_is_refused(
    gpus: int, capability: tuple[int, int] | None, ranks: int, said: str
) -> None:
    assert plan_device("auto", gpus, capability, 0, ranks) == torch.device("cpu")
    with pytest.raises(RefusedError, match=f"--device cuda: {said}"):
        plan_device("cuda", gpus, capability, 0, ranks)


def test_other_devices_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--device tpu is none of auto, cpu, cuda"):
        plan_device("tpu", 8, HOPPER, 0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_here_is_none() -> None:
    assert find_device("auto", 0, 1) == torch.device("cpu")
    with pytest.raises(RefusedError):
        find_device("cuda", 0, 1)
