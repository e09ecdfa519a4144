"""Records are read as far as they are there and right; what is wrong with the others is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arctic_trt.report.page.records import Evaluation, Quantization, Records, Verification, read_records
from tests.support.records import Raw, eval_record, quantize_record, small_config, verify_record, write_records

CONFIG = small_config()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_everything_that_is_there_is_read(tmp_path: Path) -> None:
    records = read_records(
        write_records(
            tmp_path / "a", CONFIG, quantize=quantize_record(CONFIG), verify=verify_record(CONFIG), evaluate=eval_record(CONFIG)
        )
    )
    assert records.name == "a" and records.problems == ()
    assert records.network and records.network.config.num_local_experts == 8 and records.network.mapping.tp_size == 8
    assert records.quantization and records.quantization.tokens == quantize_record(CONFIG)["tokens_per_expert"]
    assert records.verification and records.verification.sqnr and len(records.verification.sqnr) == 14
    assert records.evaluation and records.evaluation.sensitivity and records.evaluation.reference


def test_what_is_not_there_is_no_problem_except_for_the_configuration(tmp_path: Path) -> None:
    records = read_records(write_records(tmp_path / "a"))
    assert records == Records("a", problems=("config.json cannot be read: No such file or directory.",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("", "cannot be read: Expecting value"),
        ("[1]", "cannot be used: the whole file: Input should be a valid dictionary"),
        ("{}", "cannot be used: seconds: Field required."),
        ("\xff", "cannot be read"),
        ("[" * 100000, "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, text: str, said: str) -> None:
    directory = write_records(tmp_path / "a", CONFIG, verify=verify_record(CONFIG))
    (directory / "report" / "quantize.json").write_bytes(text.encode("latin-1"))
    records = read_records(directory)
    assert records.quantization is None and records.verification is not None
    assert len(records.problems) == 1 and records.problems[0].startswith("report/quantize.json ") and said in records.problems[0]


def broken(change: Callable[[Raw], object]) -> Raw:
    raw = quantize_record(CONFIG)
    change(raw)
    return raw


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (broken(lambda raw: raw.update(tokens_per_expert=[[1, 2], [3]])), "tokens_per_expert"),
        (broken(lambda raw: raw.update(tokens_per_expert=[[-1]])), "tokens_per_expert.0.0"),
        (broken(lambda raw: raw["scales"][1].update({"$x$": 1.0})), "scales.1"),
        (broken(lambda raw: raw.pop("version")), "version"),
        (broken(lambda raw: raw.update(experts_without_tokens=[[1, 2, 3]])), "experts_without_tokens.0"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path: Path, raw: Raw, where: str) -> None:
    records = read_records(write_records(tmp_path / "a", CONFIG, quantize=raw))
    assert records.quantization is None
    assert records.problems[0].startswith(f"report/quantize.json cannot be used: {where}")


def test_a_configuration_of_something_else_is_said(tmp_path: Path) -> None:
    directory = write_records(tmp_path / "a", CONFIG)
    for raw in ({"architecture": "Other"}, [], {"architecture": "LLaMAForCausalLM", "residual_mlp": True}):
        (directory / "config.json").write_text(json.dumps(raw))
        records = read_records(directory)
        assert records.network is None and len(records.problems) == 1 and "config.json" in records.problems[0]


def test_no_calibration_is_no_tokens() -> None:
    raw = {**quantize_record(CONFIG), "tokens_per_expert": [[], []]}
    assert Quantization.model_validate(raw).tokens == []
    assert Quantization.model_validate({**raw, "tokens_per_expert": []}).tokens == []


def test_a_verification_of_before_there_was_more_is_understood() -> None:
    old = {key: value for key, value in verify_record(CONFIG).items() if key not in ("sqnr", "against", "share", "worst")}
    found = Verification.model_validate(old)
    assert (found.sqnr, found.against, found.share, found.worst) == (None, None, 1.0, [])


def test_numbers_that_are_none_are_kept() -> None:
    raw = json.loads(json.dumps({**eval_record(CONFIG), "perplexity": float("inf"), "kl_max": float("nan")}))
    assert Evaluation.model_validate(raw).perplexity == float("inf")


def test_a_directory_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    directory = write_records(tmp_path / "a", CONFIG)
    os.mkdir(directory / "report" / "eval.json")
    assert read_records(directory).problems == ("report/eval.json cannot be read: Is a directory.",)


@given(JSON)
def test_whatever_is_written_there_nothing_is_raised(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    directory = write_records(tmp_path_factory.mktemp("any") / "a", CONFIG)
    for name in ("quantize", "verify", "eval"):
        (directory / "report" / f"{name}.json").write_text(json.dumps(value))
    assert len(read_records(directory).problems) == 3
