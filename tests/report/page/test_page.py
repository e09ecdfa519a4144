"""The page: every section whatever is known, the numbers of the records, nothing from outside, nothing unescaped."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arctic_trt.report.page.canvas import Picture
from arctic_trt.report.page.page import SECTIONS, Page, draw_page
from arctic_trt.report.page.records import read_records
from arctic_trt.report.page.theme import DARK, LIGHT
from tests.support.html import StrictPage
from tests.support.records import Raw, eval_record, quantize_record, small_config, verify_record, write_records

pytestmark = pytest.mark.usefixtures("undrawn")
CONFIG = small_config()
ALL: dict[str, Raw] = {"quantize": quantize_record(CONFIG), "verify": verify_record(CONFIG), "evaluate": eval_record(CONFIG)}
ALL_PICTURES = ["hidden_error", "sqnr", "tokens_per_expert", "activation_scales", "sensitivity"]


def page_of(directory: Path, **records: Any) -> Page:
    return draw_page(read_records(write_records(directory / "ckpt", CONFIG, **records)))


def changed(raw: Raw, **values: Any) -> Raw:
    return {**raw, **values}


@pytest.mark.parametrize("present", [names for n in range(4) for names in itertools.combinations(ALL, n)], ids=",".join)
def test_every_section_is_there_whatever_is_known(tmp_path: Path, present: tuple[str, ...]) -> None:
    drawn = page_of(tmp_path, **{name: ALL[name] for name in present})
    page = StrictPage(drawn.html)
    assert list(page.by_section) == list(SECTIONS)
    assert page.loads[: len(SECTIONS)] == [f"#{name}" for name in SECTIONS]
    missing = {name for name, text in page.by_section.items() if re.search("not measured|not known|Not verified", text)}
    known = {"quantize": {"calibration", "scales"}, "verify": {"verification", "noise"}, "evaluate": {"quality", "sensitivity"}}
    for name, sections in known.items():
        assert missing.isdisjoint(sections) if name in present else sections <= missing
    assert ("costs" in missing) == (not present)
    assert len(drawn.pictures) == 2 * ("quantize" in present) + ("verify" in present) + 2 * ("evaluate" in present)
    assert page.alts == [picture.alt for picture in drawn.pictures]


def test_the_document_is_complete_and_loads_nothing(tmp_path: Path) -> None:
    drawn = page_of(tmp_path, **ALL)
    assert drawn.html.startswith("<!doctype html>\n<html lang=")
    assert [picture.name for picture in drawn.pictures] == ALL_PICTURES
    page = StrictPage(drawn.html)
    assert {"script", "link", "iframe", "object", "base", "form"}.isdisjoint(page.tags)
    assert all(re.match(r"#[a-z]+$|data:image/png;base64,[A-Za-z0-9+/]+=*$", load) for load in page.loads)
    assert not re.search(r"url\(|@import|https?:", page.style)
    assert "default-src 'none'" in drawn.html.replace("&#x27;", "'")


def test_both_themes_are_in_the_page_and_paper_is_light(tmp_path: Path) -> None:
    drawn = page_of(tmp_path, **ALL)
    style = StrictPage(drawn.html).style
    assert f"--paper: {LIGHT.paper}" in style and style.index(LIGHT.paper) < style.index(DARK.paper)
    assert style.count("@media screen and (prefers-color-scheme: dark)") == 1, "not on paper"
    assert drawn.html.count('<source media="screen and (prefers-color-scheme: dark)"') == len(drawn.pictures)
    variables = set(re.findall(r"var\(--([a-z]+)\)", style))
    assert variables <= set(re.findall(r"--([a-z]+):", style)), "every colour that is used is defined"


def test_the_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    sections = StrictPage(page_of(tmp_path, **ALL).html).by_section
    evaluated, made = ALL["evaluate"], ALL["quantize"]
    said = " ".join(sections["quality"].split())
    assert f"this checkpoint {evaluated['perplexity']:.4f} {evaluated['nll']:.4f} +0.42 %" in said
    assert f"reference {evaluated['reference']['perplexity']:.4f}" in said
    for value in ("0.01172 nats", "0.1493 nats", "1.7330 nats", "97.13 %", "30,348 predicted tokens in 64 samples"):
        assert value in said
    assert "3 h 09 min" in sections["costs"] and "5.43 GB" in sections["costs"] and "480.12 GB" in sections["costs"]
    for key in ("checkpoint_headers", "config", "calibration_ids"):
        assert made["fingerprint"][key] in sections["provenance"]
    assert evaluated["data"]["digest"] in sections["provenance"]
    assert all(key in sections["provenance"] for key, value in made["recipe"].items() if value is not None)
    assert "calib_dataset" not in sections["provenance"], "flags that were not given say nothing"


def test_noise_is_summed_up_by_site(tmp_path: Path) -> None:
    sqnr = [
        {"layer": 0, "site": "mlp.proj", "min_db": 20.0, "mean_db": 30.0, "count": 3},
        {"layer": 1, "site": "mlp.proj", "min_db": 25.0, "mean_db": 34.0, "count": 1},
        {"layer": 0, "site": "unheard.of", "min_db": 9.5, "mean_db": 9.5, "count": 1},
        {"layer": 1, "site": "attention.qkv", "min_db": 31.0, "mean_db": 31.0, "count": 1},
    ]
    page = StrictPage(page_of(tmp_path, verify=changed(ALL["verify"], sqnr=sqnr)).html)
    rows = " ".join(page.by_section["noise"].split())
    assert "attention.qkv 1 31.00 dB 31.00 dB layer 1 mlp.proj 4 31.00 dB 20.00 dB layer 0 unheard.of 1 9.50 dB" in rows
    assert "worst SQNR 9.5 dB" in " ".join(page.text.split())


def test_before_there_was_sqnr_by_site_the_worst_matrices_are_listed(tmp_path: Path) -> None:
    page = StrictPage(page_of(tmp_path, verify=changed(ALL["verify"], sqnr=None)).html)
    assert "transformer.layers.0.mlp.proj.weight[7] 24.00 dB" in " ".join(page.by_section["noise"].split())
    assert page.alts == []


def test_under_covered_experts_are_listed_least_first(tmp_path: Path) -> None:
    tokens = [[1000, 0, 1000, 60, 1000, 1000, 1000, 1000], [1000, 1000, 1000, 1000, 1000, 1000, 1000, 7]]
    made = changed(ALL["quantize"], tokens_per_expert=tokens, experts_without_tokens=[[0, 1]])
    page = StrictPage(page_of(tmp_path, quantize=made).html)
    said = " ".join(page.by_section["calibration"].split())
    assert "1 of 16 experts saw no token, 2 more saw fewer than a tenth of their layer's mean." in said
    assert "layer 0 expert 1: no token layer 1 expert 7: 7 of 876 layer 0 expert 3: 60 of 758" in said
    assert "experts without tokens 1 of 16" in " ".join(page.text.split())


def test_long_lists_are_cut_and_say_so(tmp_path: Path) -> None:
    made = changed(ALL["quantize"], tokens_per_expert=[[9] + [0] * 39, [9] + [0] * 39])
    sections = StrictPage(page_of(tmp_path, quantize=made, verify=verify_record(CONFIG, findings=207)).html).by_section
    assert (
        sections["calibration"].count(":  no token") == 32
        and "46 more experts are in report/quantize.json" in sections["calibration"]
    )
    assert (
        sections["verification"].count("lacks tensor") == 200
        and "7 more findings are in report/verify.json" in sections["verification"]
    )


def test_a_checkpoint_that_was_not_calibrated_says_so(tmp_path: Path) -> None:
    made = changed(ALL["quantize"], tokens_per_expert=[[], []], scales=[{}, {}], calibration_samples=0, experts_without_tokens=[])
    page = StrictPage(page_of(tmp_path, quantize=made).html)
    assert "holds no activation scales" in page.by_section["calibration"] and "not known" in page.by_section["scales"]
    assert page.alts == [] and "not calibrated" in page.text


def test_gate_has_a_line_of_its_own_only_where_it_differs(tmp_path: Path) -> None:
    assert "residual_mlp.gate" not in StrictPage(page_of(tmp_path / "a", quantize=ALL["quantize"]).html).by_section["scales"]
    made = json.loads(json.dumps(ALL["quantize"]))
    made["scales"][1]["residual_mlp.gate.activation_scaling_factor"] *= 2
    assert "residual_mlp.gate" in StrictPage(page_of(tmp_path / "b", quantize=made).html).by_section["scales"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"share": 0.0, "against": None}, "Looked at: structure only"),
        ({"against": None}, "Looked at: structure and every matrix, by itself."),
        ({"share": 0.1}, "structure and a sample of 10 % of the matrices, byte by byte against snowflake-arctic-instruct."),
        ({"passed": False, "errors": 1}, "Failed , with 1 error and 0 warnings."),
    ],
)
def test_how_deep_a_verification_looked_is_said(tmp_path: Path, values: Raw, said: str) -> None:
    page = StrictPage(page_of(tmp_path, verify=changed(ALL["verify"], **values)).html)
    assert said in " ".join(page.by_section["verification"].split())


def test_findings_are_shown_errors_first(tmp_path: Path) -> None:
    drawn = page_of(tmp_path, verify=verify_record(CONFIG, findings=3)).html
    assert drawn.count('<span class="error">') == 2 and drawn.count('<span class="warning">') == 1
    assert "failed, 2 errors" in drawn


def test_problems_are_said_on_the_page(tmp_path: Path) -> None:
    directory = write_records(tmp_path / "ckpt", CONFIG, evaluate={"perplexity": "<low>"})
    (directory / "report" / "verify.json").write_text("{")
    page = StrictPage(draw_page(read_records(directory)).html)
    assert (
        "report/verify.json cannot be read" in page.text and "report/eval.json cannot be used: path: Field required." in page.text
    )


def test_what_was_not_compared_is_not_invented(tmp_path: Path) -> None:
    nothing = dict.fromkeys(
        ("against", "reference", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "hidden_error", "sensitivity")
    )
    page = StrictPage(page_of(tmp_path, evaluate=changed(ALL["evaluate"], **nothing)).html)
    said = page.by_section["quality"]
    assert said.count("not measured") == 4 and "reference" not in said and page.alts == []
    assert "arctic-trt eval ckpt --against MODEL_DIR --sensitivity" in page.by_section["sensitivity"]


def test_the_command_that_measures_names_the_model(tmp_path: Path) -> None:
    made = changed(ALL["quantize"], recipe={"model_dir": "/my models/arctic"})
    page = StrictPage(page_of(tmp_path, quantize=made).html)
    assert "arctic-trt verify ckpt --against '/my models/arctic'" in page.by_section["noise"]


HOSTILE = "<script>alert(1)</script>\"'&{}$x^2$|`--><!--"


def hostile(value: Any) -> Any:
    """The same record with every string made hostile, but for those that are words of a fixed list."""
    if isinstance(value, dict):
        return {key: item if key in ("site", "severity") else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    directory = write_records(
        tmp_path / "<img src=x onerror=y>", CONFIG, **{name: hostile(record) for name, record in ALL.items()}
    )
    drawn = draw_page(read_records(directory))
    page = StrictPage(drawn.html)
    assert "script" not in page.tags and page.tags.count("img") == len(drawn.pictures) == 5
    assert HOSTILE in page.text and "<img src=x onerror=y>" in page.text
    assert not [load for load in page.loads if not load.startswith(("#", "data:"))]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(), st.floats(), st.floats(), st.text(max_size=20), st.integers(0, 2**80))
def test_any_number_can_be_shown(
    tmp_path_factory: pytest.TempPathFactory, perplexity: float, reference: float, kl: float, text: str, count: int
) -> None:
    evaluated = changed(
        ALL["evaluate"],
        perplexity=perplexity,
        reference={"perplexity": reference, "nll": kl},
        kl_mean=kl,
        path=text,
        peak_rss_bytes=count,
    )
    made = changed(ALL["quantize"], bytes_written=count, seconds=abs(kl) if kl == kl and abs(kl) < 1e300 else 0.0)
    drawn: tuple[Picture, ...] = page_of(tmp_path_factory.mktemp("any"), evaluate=evaluated, quantize=made).pictures
    assert len(drawn) in (2, 4)
