"""Tensors by themselves, and how far two are from each other in steps of their dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.numbers import check_numbers, describe_difference, steps_from_zero

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = E4M3[E4M3.float().isfinite()]


def test_steps_count_the_numbers_between() -> None:
    """In order of their values e4m3's codes are one step apart, both zeros being one number."""
    ordered = FINITE[FINITE.float().argsort(stable=True)]
    steps = steps_from_zero(ordered).diff()
    assert sorted(steps.tolist()) == [0] + [1] * 252
    assert steps_from_zero(torch.tensor([0.0, -0.0])).tolist() == [0, 0]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_next_number_is_one_step_away(value: float, dtype: torch.dtype) -> None:
    x = torch.tensor([value]).to(dtype)
    if x.isfinite():
        above = torch.nextafter(x, torch.tensor([torch.inf]).to(dtype))
        assert int(steps_from_zero(above) - steps_from_zero(x)) == 1
        assert int(steps_from_zero(-x)) == -int(steps_from_zero(x))


@pytest.mark.parametrize(
    ("stored", "expected", "sentence"),
    [
        ([1.0, 2.0, 3.0, -4.0], [1.0, 2.0, 3.0, -4.0], "in 0 of 4 elements, by up to 0 e4m3 steps"),
        ([1.0, 2.25, 3.0, -4.0], [1.0, 2.0, 3.0, -4.0], "in 1 of 4 elements, by up to 1 e4m3 step"),
        ([448.0, 2.0, 3.0, -0.0], [-448.0, 2.0, 3.0, 0.0], "in 2 of 4 elements, by up to 252 e4m3 steps"),
    ],
)
def test_differences(stored: list[float], expected: list[float], sentence: str) -> None:
    assert describe_difference(*(torch.tensor(x).to(torch.float8_e4m3fn).view(2, 2) for x in (stored, expected))) == sentence


def test_differences_of_others_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arctic_trt.report.verify.numbers.CHUNK_ELEMENTS", 3)
    x = torch.arange(1, 9).bfloat16()
    assert describe_difference(x * (1 + 2**-7), x) == "in 8 of 8 elements, by up to 2 bf16 steps"
    assert describe_difference(x.float(), x.float().neg()).startswith("in 8 of 8 elements, by up to ")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_what_is_wrong_by_itself(dtype: torch.dtype) -> None:
    right = torch.tensor([0.0, -1.0, 2.0])
    for values, kinds in ((right, []), (right * 0, ["zero"]), (torch.tensor([1.0, float("nan")]), ["not finite"])):
        found = Verification()
        check_numbers(values.to(dtype), "rank0.safetensors", "w", found)
        assert [finding.kind for finding in found.findings] == kinds
    check_numbers(torch.zeros(2).to(dtype), "rank0.safetensors", "w", found := Verification(), may_be_zero=True)
    assert found.findings == []
