"""The checks for a GPU: what they say on a CPU, where twins stand for kernels, and that they would see a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from arctic_trt.runtime.blocks import KvRoom
from arctic_trt.runtime.cuda.ops import Routed
from arctic_trt.runtime.cuda.twin import TwinOps
from tests.support.engines import ROOT
from tests.support.scripts import load_script

gpu_checks, kernel_check, logits_check = (load_script(name) for name in ("gpu_checks", "kernel_check", "logits_check"))
CPU = torch.device("cpu")
NAN = float("nan")


def place(directory: Path, ops: object = None) -> Any:
    return gpu_checks.Place(CPU, gpu_checks.SIZES["small"], directory, lambda *_: ops or TwinOps())


def test_the_whole_program_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "checks.jsonl"
    words = [sys.executable, ROOT / "scripts" / "check_gpu", "--device", "cpu", "--size", "small", "--json", "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["good"] and "twins stand for kernels" in found["device"]
    assert [check["check"] for check in found["checks"]] == ["tiny", "rank", "kernels", "launches", "quantize", "load"]
    assert [check["good"] for check in found["checks"]] == [True, True, True, None, True, True], "what needs a GPU is not good"
    assert found["checks"][-1]["rows"][-1][:2] == ["rate, at least 0.7 of the slower", None]
    assert [json.loads(line) for line in out.read_text().splitlines()] == found["checks"]
    rows = {check["check"]: [what for what, _, _ in check["rows"]] for check in found["checks"]}
    assert rows["tiny"] == rows["rank"] == ["prefill", "decode", "prompt in parts", "batch"]
    assert len(rows["kernels"]) > 10 and len(rows["quantize"]) == 7


class TestOneThatFails:
    def run(self, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, dict[str, Any]]:
        def breaks(place: object) -> Iterator[tuple[str, bool, str]]:
            yield "the first half", True, "well"
            raise RuntimeError("the second\nhalf")

        program = load_script("check_gpu")
        checks = {
            "breaks": program.Check(breaks, 10),
            "wrong": program.Check(lambda place: iter([("it", False, "is wrong")]), 10),
            "empty": program.Check(lambda place: iter([]), 10),
            "slow": program.Check(lambda place: iter([("it", True, "takes long")]), -1),
        }
        monkeypatch.setattr(program, "CHECKS", checks)
        done = CliRunner().invoke(program.main, ["--device", "cpu", "--json", *words])
        return done.exit_code, {check["check"]: check for check in json.loads(done.stdout)["checks"]}

    def test_the_others_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        code, checks = self.run(monkeypatch)
        assert code == 1 and list(checks) == ["breaks", "wrong", "empty", "slow"]
        assert checks["breaks"]["rows"] == [
            ["the first half", True, "well"],
            ["broke off", False, "RuntimeError: the second half"],
        ]
        assert [checks[name]["good"] for name in checks] == [False, False, False, True]
        assert checks["slow"]["late"] and not checks["wrong"]["late"]


class Mistaken(TwinOps):
    """Twins with one mistake."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self._mistake = mistake

    def route(self, x_TD: Tensor, router_ED: Tensor, top_k: int, experts: range) -> Routed:
        routed = super().route(x_TD, router_ED, top_k, experts)
        share_S = routed.share_S.view(-1, top_k).flip(1).flatten() if self._mistake == "shares" else routed.share_S
        return Routed(routed.expert_S, share_S, top_k)

    def project(self, x: Tensor, projection: Any, *arguments: Any, **options: Any) -> Tensor:
        y = super().project(x, projection, *arguments, **options)
        return y * 1.02 if self._mistake == "scale" and projection.alpha is not None else y

    def norm(self, *arguments: Any) -> list[Tensor]:
        sum_TD, *others = super().norm(*arguments)
        if self._mistake == "code":
            others[0] = (others[0].view(torch.uint8) ^ 1).view(others[0].dtype) if others[0].dtype.itemsize == 1 else others[0]
        return [sum_TD, *(each * NAN if self._mistake == "nan" and each.dtype == torch.float32 else each for each in others)]


@pytest.mark.parametrize(("mistake", "where"), [("shares", "route, float32"), ("scale", "project"), ("code", "norm, float8")])
def test_kernels_that_are_mistaken_are_named(mistake: str, where: str, tmp_path: Path) -> None:
    rows = list(gpu_checks.kernels(place(tmp_path, Mistaken(mistake))))
    wrong = [what for what, well, _ in rows if not well]
    assert wrong and all(what.startswith(where) for what in wrong)


@pytest.mark.parametrize("mistake", ["shares", "nan"])
def test_logits_of_mistaken_kernels_are_too_far_away(mistake: str, tmp_path: Path) -> None:
    rows = list(gpu_checks.rank_logits(place(tmp_path, Mistaken(mistake))))
    assert len(rows) == 4 and not any(well for _, well, _ in rows)


F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("found", "wanted", "well"),
    [
        (torch.ones(100), torch.ones(100) + 1e-4, True),
        (torch.ones(100), torch.ones(100) + 1e-3, False),
        (torch.ones(1000), torch.ones(1000).index_fill(0, torch.tensor(3), 1.02), False),
        (torch.full((3,), NAN), torch.ones(3), False),
        (torch.ones(3), torch.full((3,), NAN), False),
        (torch.zeros(3), torch.zeros(3), True),
        (torch.ones(4).bfloat16(), torch.ones(4).bfloat16(), True),
        (torch.ones(500).bfloat16(), torch.ones(500).bfloat16().index_fill(0, torch.tensor(0), 1.0078125), True),
        (torch.ones(500).bfloat16(), torch.ones(500).bfloat16().index_fill(0, torch.tensor(0), 1.015625), False),
        (torch.ones(200).to(F8), torch.ones(200).index_fill(0, torch.tensor(0), 1.125).to(F8), True),
        (torch.ones(200).to(F8), torch.ones(200).index_fill(0, torch.tensor(0), 1.25).to(F8), False),
        (torch.ones(200).to(F8), torch.full((200,), 1.125).to(F8), False),
        (torch.full((200,), -0.0).to(F8), torch.zeros(200).to(F8), True),
        (torch.full((2,), -(2.0**-9)).to(F8), torch.full((2,), 2.0**-9).to(F8), False),
        (torch.full((3,), NAN).to(F8), torch.full((3,), 448.0).to(F8), False),
        (torch.arange(9), torch.arange(9), True),
        (torch.arange(9), torch.arange(9).flip(0), False),
    ],
)
def test_what_counts_as_alike(found: Tensor, wanted: Tensor, well: bool) -> None:
    class Gives:
        def __init__(self, result: Tensor) -> None:
            self.result = result

        def op(self) -> list[Tensor]:
            return [self.result]

    both = kernel_check.BothWays(Gives(found), Gives(wanted))
    assert both.op()[0] is found
    assert [row[1] for row in both.rows()] == [well]


class ByExpert(Routed):
    """Slots of another layout."""


class Reversed(TwinOps):
    """Experts' rows the other way round, from route to combine; ``off`` is a mistake in the end."""

    def __init__(self, off: float) -> None:
        super().__init__()
        self._off = off

    def route(self, *arguments: Any) -> Routed:
        routed = super().route(*arguments)
        return ByExpert(routed.expert_S, routed.share_S, routed.top_k)

    def expert_gated(self, *arguments: Any) -> Tensor:
        codes = super().expert_gated(*arguments)
        return codes.view(torch.uint8).flip(0).view(codes.dtype)

    def expert_project(self, inner: Tensor, *arguments: Any) -> Tensor:
        return super().expert_project(inner.view(torch.uint8).flip(0).view(inner.dtype), *arguments).flip(0)

    def combine(self, y_TD: Tensor, slots_SD: Tensor, routed: Routed) -> Tensor:
        return super().combine(y_TD, slots_SD.flip(0), routed) * (1 + self._off)


@pytest.mark.parametrize(("off", "well"), [(0.0, True), (0.2, False)])
def test_rows_in_another_order_are_compared_when_they_are_added_up(off: float, well: bool, tmp_path: Path) -> None:
    rows = {what: good for what, good, _ in gpu_checks.kernels(place(tmp_path, Reversed(off)))}
    assert not any(what.startswith("expert") for what in rows)
    assert [good for what, good in rows.items() if "rows by expert" in what] == [well]


def test_results_of_another_kind_are_an_error() -> None:
    class Gives:
        def __init__(self, *shape: int) -> None:
            self.shape = shape

        def op(self) -> Tensor:
            return torch.zeros(self.shape)

    with pytest.raises(ValueError, match=r"gave torch\.float32 \[2, 3\], expected torch\.float32 \[3\]"):
        kernel_check.BothWays(Gives(2, 3), Gives(3)).op()


def test_what_is_written_into_an_argument_is_compared_too() -> None:
    class Writes:
        def __init__(self, *places: int) -> None:
            self.places = places

        def store(self, cache: Tensor) -> None:
            for at in self.places:
                cache.view(torch.uint8)[at] = 0x38

    cache = torch.zeros(1000, dtype=F8)
    both = kernel_check.BothWays(Writes(5, 7), Writes(5, 6))
    both.store(cache)
    ((what, well, figures),) = both.rows()
    assert what == "store, float8_e4m3fn" and not well and "66.67% differ" in figures, "of the three that were written"
    assert cache[7] and not cache[6], "the kernel's word stays"


@pytest.mark.parametrize(
    ("calls", "well"),
    [
        ({"cudaGraphLaunch": 1, "cudaMemcpyAsync": 1}, True),
        ({"cudaGraphLaunch": 2}, False),
        ({"cudaLaunchKernel": 1}, False),
        ({"cudaGraphLaunch": 1, "cuLaunchKernelEx": 1}, False),
        ({"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1}, False),
    ],
)
def test_a_step_is_one_launch(calls: dict[str, int], well: bool) -> None:
    assert gpu_checks.judge_calls(calls)[0] is well


@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: x * NAN])
def test_logits_are_compared_in_numbers(change: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    bound = logits_check.compare(logits + 1e-6, logits)
    assert logits_check.within(bound, bound) and bound.same_token == 1
    assert not logits_check.within(logits_check.compare(change(logits), logits), bound)


def test_steps_cover_what_they_promise() -> None:
    sizes = logits_check.Sizes(70, (20, 30), 3)
    room = logits_check.room_for(sizes)
    plan = logits_check.plan_steps(sizes, 50, room)
    assert {kind: [step.num_tokens for step in steps] for kind, steps in plan.items()} == {
        "prefill": [70],
        "decode": [1, 1, 1],
        "prompt in parts": [20, 30],
        "batch": [2, 2, 2],
    }
    chunks = [chunk for steps in plan.values() for step in steps for chunk in step.chunks]
    assert sorted(block for chunk in chunks for block in chunk.blocks) == list(range(room.num_blocks))
    for sequence, length in enumerate(sizes.lengths):
        mine = [chunk for chunk in chunks if chunk.sequence == sequence]
        ends = [chunk.start + len(chunk.tokens) for chunk in mine]
        assert [chunk.start for chunk in mine] == [0, *ends[:-1]] and ends[-1] == length
        assert sum(len(chunk.blocks) for chunk in mine) == KvRoom(0).blocks_for(length)
