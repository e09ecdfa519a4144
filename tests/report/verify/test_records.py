"""What a quantization wrote down, as verification reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.checkpoint.digests import DIGESTS
from arctic_trt.quantize.pipeline import REPORT
from arctic_trt.report.verify.findings import Verification
from arctic_trt.report.verify.records import Report, check_crc, read_records

EXPERTS = "mlp.fc.weights_scaling_factor"
WHOLE: dict[str, Any] = {"scales": [{"a": 1.5}], "expert_scales": [{"mlp.fc": [0.5, 0.25]}], "config": {}, "recipe": {}}


def write(path: Path, report: object, digests: object) -> Path:
    (path / "report").mkdir(exist_ok=True)
    for name, value in ((REPORT, report), (DIGESTS, digests)):
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_scales_by_layer_and_name() -> None:
    report = Report(**WHOLE)
    assert report.scale(0, "a") == [1.5] and report.scale(0, EXPERTS) == [0.5, 0.25]
    assert report.scale(0, "b") == report.scale(1, "a") == report.scale(1, EXPERTS) == []
    assert Report(scales=[{"a": 1.5}]).scale(0, EXPERTS) is None, "an earlier version did not record it"


@pytest.mark.parametrize(
    ("recipe", "maxima"),
    [
        ({}, True),
        ({"calibrator": "streaming", "calib_algorithm": "mse"}, True),
        ({"calibrator": "modelopt", "calib_algorithm": "max"}, True),
        ({"calibrator": "modelopt"}, True),
        ({"calibrator": "modelopt", "calib_algorithm": "mse"}, False),
    ],
)
def test_who_chose_the_scales(recipe: dict[str, Any], maxima: bool) -> None:
    assert Report(**{**WHOLE, "recipe": recipe}).scales_are_maxima is maxima


def test_whole_records(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"123456789")
    digests = {"files": {"tokenizer.json": "cbf43926"}, "tensors": {"rank0.safetensors": {"w": "00000001"}}}
    records = read_records(write(tmp_path, WHOLE, digests), found := Verification())
    assert records.report and records.digests and found.findings == []
    check_crc(records.digests, "rank0.safetensors", "w", 1, found)
    assert found.findings == []
    check_crc(records.digests, "rank0.safetensors", "w", 2, found)
    check_crc(records.digests, "rank1.safetensors", "w", 1, found)
    check_crc(None, "rank1.safetensors", "w", 1, found)
    assert [finding.sentence for finding in found.errors] == [
        "w is not what was written: its CRC-32 is 00000002, report/digests.json says 00000001.",
        "w is not what was written: its CRC-32 is 00000001, report/digests.json says nothing.",
    ]


@pytest.mark.parametrize("report", ["{", "[]", {"scales": [1]}, {"scales": [{}], "config": 3}, "\x00"])
def test_a_report_that_cannot_be_read_is_an_error(report: object, tmp_path: Path) -> None:
    records = read_records(write(tmp_path, report, {"files": {}, "tensors": {}}), found := Verification())
    assert records.report is None and [(finding.kind, finding.file) for finding in found.errors] == [("report", REPORT)]


@pytest.mark.parametrize("digests", ["", "[]", {"files": {}}, {"files": {"a": "xyz"}, "tensors": {}}])
def test_digests_that_cannot_be_read_are_an_error(digests: object, tmp_path: Path) -> None:
    records = read_records(write(tmp_path, WHOLE, digests), found := Verification())
    assert records.digests is None and [(finding.kind, finding.file) for finding in found.errors] == [("digest", DIGESTS)]


def test_no_records_are_two_warnings(tmp_path: Path) -> None:
    records = read_records(tmp_path, found := Verification())
    assert records.report is records.digests is None
    assert found.passed and [finding.kind for finding in found.findings] == ["report", "digest"]
