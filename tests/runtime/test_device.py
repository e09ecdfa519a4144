"""Which device a rank gets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.errors import RefusedError, UsageError
from arctic_trt.runtime.device import AUTO, CPU, CUDA, Sight, look_around, plan_devices, share_out, take_device

HOPPER = (9, 0)
NAMES = tuple("abcdefgh")


def cuda(*indices: int) -> list[torch.device]:
    return [torch.device("cuda", index) for index in indices]


def sights(*gpus: str, host: str = "one", capability: tuple[int, int] | None = HOPPER) -> list[Sight]:
    """A rank for each word, which sees a GPU a letter."""
    return [Sight(host, tuple(seen), capability) for seen in gpus]


@pytest.mark.parametrize("asked", [AUTO, CUDA])
@pytest.mark.parametrize(
    ("found", "indices"),
    [
        (sights(*["abcdefgh"] * 8), range(8)),
        (sights(*NAMES), [0] * 8),
        (sights("abcd", "abcd", host="one") + sights("efgh", "efgh", host="two"), [0, 1, 0, 1]),
        (sights("ab", "ab", host="one") + sights("cd", "cd", host="one"), [0, 1, 0, 1]),
        (sights("abcd"), [0]),
        (sights("ab", "a"), [1, 0]),
    ],
    ids=["all see all", "each sees one", "two hosts", "one name for two containers", "alone", "unlike"],
)
def test_each_rank_has_its_own_gpu(asked: str, found: list[Sight], indices: list[int]) -> None:
    assert plan_devices(asked, found) == cuda(*indices)


def test_the_cpu_is_taken_when_asked_for() -> None:
    assert plan_devices(CPU, sights("ab", "ab")) == [torch.device("cpu")] * 2
    assert look_around(CPU).gpus == ()


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (sights("", capability=None), "one has no CUDA device that torch can use"),
        (sights("ab", "ab") + sights("", host="two", capability=None), "two has no CUDA device that torch can use"),
        (sights(*["abcd"] * 8), "8 ranks on one need a GPU each, they see 4"),
        (sights("a", "b", "b"), "3 ranks on one need a GPU each, they see 2"),
        (sights("ab", "ab", capability=(8, 0)), "the GPUs of one have compute capability 8.0, FP8 needs 8.9"),
    ],
)
def test_without_what_they_need_all_ranks_take_the_cpu_or_are_refused(found: list[Sight], said: str) -> None:
    assert plan_devices(AUTO, found) == [torch.device("cpu")] * len(found)
    with pytest.raises(RefusedError, match=f"--device cuda: {said}"):
        plan_devices(CUDA, found)


@given(st.lists(st.sets(st.sampled_from(NAMES)).map(sorted), max_size=8))
def test_no_gpu_is_given_twice_and_only_to_who_sees_it(seen: list[list[str]]) -> None:
    taken = share_out(seen)
    given_out = [gpu for gpu in taken if gpu]
    assert len(given_out) == len(set(given_out)) and len(taken) == len(seen)
    assert all(gpu is None or gpu in mine for gpu, mine in zip(taken, seen, strict=True))
    assert all(set(mine) <= set(given_out) for gpu, mine in zip(taken, seen, strict=True) if gpu is None)


def test_other_devices_are_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--device tpu is none of auto, cpu, cuda"):
        plan_devices("tpu", sights("a"))


def test_rank_0_says_why_gpus_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    found = sights("a", "a")
    assert take_device(AUTO, found, 1) == torch.device("cpu") and not caplog.records
    assert take_device(AUTO, found, 0) == torch.device("cpu")
    assert caplog.messages == ["Running on the CPU: 2 ranks on one need a GPU each, they see 1."]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_here_is_none() -> None:
    found = [look_around(AUTO)]
    assert take_device(AUTO, found, 0) == torch.device("cpu")
    with pytest.raises(RefusedError):
        take_device(CUDA, found, 0)
