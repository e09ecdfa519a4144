"""What quantize does otherwise on a GPU, as far as it shows without one: divisions, copies, and which GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arctic_trt.errors import RefusedError
from arctic_trt.model.layer import MlpWeights, on_device
from arctic_trt.quantize.device import check_device, full_device_refused, take_device
from arctic_trt.quantize.fp8 import E4M3_MAX, amax, cast_e4m3, scale_from_amax
from arctic_trt.quantize.stream import WeightStream
from tests.support.checkpoints import TINY, random_checkpoint, random_ids, write_samples
from tests.support.jobs import quantize, read_ranks

EVERY_AMAX = torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


class Divisions(TorchDispatchMode):
    """Notes divisions whose divisor is a number, or does not lie beside what is divided: CUDA takes the reciprocal of those."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.reciprocal):
            self.count += 1
            beside = len(args) > 1 and isinstance(args[1], Tensor) and args[1].device == args[0].device
            if not beside:
                self.wrong.append(str(func))
        return func(*args, **(kwargs or {}))


def by_a_number(value: Tensor) -> Tensor:
    return value.float() / E4M3_MAX


def by_a_tensor_of_the_host(value: Tensor) -> Tensor:
    return value.float().div(torch.tensor(E4M3_MAX))


def by_a_reciprocal(value: Tensor) -> Tensor:
    return value.float() * torch.full_like(value, E4M3_MAX, dtype=torch.float32).reciprocal()


@pytest.mark.parametrize(
    ("work", "right"),
    [
        (scale_from_amax, True),
        (lambda value: cast_e4m3(value, torch.ones(1)), True),
        (lambda value: cast_e4m3(value, torch.ones((), device="meta")), True),
        (lambda value: scale_from_amax(amax(value)), True),
        (by_a_number, False),
        (by_a_tensor_of_the_host, False),
        (by_a_reciprocal, False),
    ],
)
def test_away_from_the_host_divisors_are_tensors_there(work: Callable[[Tensor], Tensor], right: bool) -> None:
    with Divisions() as divisions:
        work(torch.empty(1000, dtype=torch.bfloat16, device="meta"))
    assert divisions.count and (not divisions.wrong) is right


@pytest.fixture
def cuda_divides(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Division as CUDA does it, on every thread: by a number, or by what may be a tensor of the host, it is a multiplication."""
    true_division = torch.Tensor.div

    def divide(self: Tensor, other: Any, **options: Any) -> Tensor:
        tensors = isinstance(other, Tensor) and (other.dim() or not self.dim())
        if options or tensors or not self.is_floating_point():
            return true_division(self, other, **options)
        return self * (1.0 / torch.as_tensor(other, dtype=torch.float32)).item()

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "div", divide)
        patched.setattr(torch.Tensor, "__truediv__", divide)
        yield


@pytest.mark.usefixtures("cuda_divides")
def test_the_substitute_divides_otherwise() -> None:
    """In more than half of all scales, or the next test would say nothing."""
    assert (by_a_number(EVERY_AMAX) != scale_from_amax(EVERY_AMAX)).float().mean() > 0.5


def test_scales_and_codes_are_the_same_where_division_is_cudas(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_checkpoint(tmp_path / "model", TINY, seed=3, shards=1)
    samples = write_samples(tmp_path / "samples.jsonl", random_ids(TINY["vocab_size"], [12] * 3, seed=4))
    recipe = {"calib_dataset": str(samples), "tp_size": 2}
    quantize(model, tmp_path / "host", **recipe)
    request.getfixturevalue("cuda_divides")
    quantize(model, tmp_path / "device", **recipe)
    for ours, theirs in zip(read_ranks(tmp_path / "host"), read_ranks(tmp_path / "device"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].view(torch.uint8).equal(theirs[name].view(torch.uint8)) for name in ours)


class Copied(Tensor):
    """Remembers how it was asked to move."""

    asked: list[tuple[str, bool]] = []  # noqa: RUF012 - of the class

    def to(self, device: str, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        self.asked.append((device, non_blocking))
        return self


@pytest.mark.parametrize(("device", "hurried"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_what_comes_back_from_a_gpu_is_waited_for(device: str, hurried: bool) -> None:
    """Torch copies to the host without waiting, if it may, and what is written then has not arrived."""
    Copied.asked.clear()
    on_device(MlpWeights(*(torch.zeros(1).as_subclass(Copied) for _ in range(3))), device)
    assert Copied.asked == [(device, hurried)] * 3


class Source:
    def dense(self, layer: int, memory: Tensor) -> Tensor:
        return memory

    def expert(self, layer: int, expert: int, memory: Tensor) -> Tensor:
        return memory

    def buffer_bytes(self, layer: int, expert: int | None) -> int:
        return 8

    def expect(self, layer: int, expert: int | None) -> None:
        pass


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda:0", True)])
def test_buffers_are_where_a_gpu_fetches_by_itself(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, empty = [], torch.empty

    def pretend(*sizes: int, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(pin_memory)
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", pretend)
    monkeypatch.setattr("arctic_trt.quantize.stream.on_device", lambda weights, device: weights)
    with WeightStream(Source(), [0], range(2), 2, device) as stream:
        stream.dense(0).release()
        for expert in range(2):
            stream.expert(0, expert).release()
    assert asked == [pinned] * 3


def test_processes_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    flags = torch.backends.cuda.matmul
    try:
        assert take_device("cpu", 3) == "cpu" and flags.allow_bf16_reduced_precision_reduction
        assert [take_device("cuda", process) for process in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
        assert not flags.allow_bf16_reduced_precision_reduction
    finally:
        flags.allow_bf16_reduced_precision_reduction = True


def test_a_gpu_that_is_too_small_is_named() -> None:
    said = r"--device cuda: the GPU's memory does not suffice \(CUDA out of memory\)"
    with pytest.raises(RefusedError, match=said) as caught, full_device_refused("cuda"):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    assert "--batch_size" in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(RefusedError, match="no CUDA device"):
        check_device("cuda")
