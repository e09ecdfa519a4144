"""The model card: a front matter that YAML reads, numbers that are the records', no path of the machine, no markup from data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from arctic_trt.checkpoint.output_dir import CARD_MARK, is_own_card
from arctic_trt.report.page.card import draw_card
from arctic_trt.report.page.page import draw_page
from arctic_trt.report.page.records import read_records
from tests.support.records import Raw, eval_record, quantize_record, small_config, verify_record, write_records

pytestmark = pytest.mark.usefixtures("undrawn")
CONFIG = small_config()
QUANTIZE, VERIFY, EVALUATE = quantize_record(CONFIG), verify_record(CONFIG), eval_record(CONFIG)


def card_of(directory: Path, config: Any = CONFIG, **records: Any) -> str:
    found = read_records(write_records(directory / "ckpt", config, **records))
    return draw_card(found, draw_page(found).pictures)


def front_matter(card: str) -> Raw:
    begin, block, _ = card.split("---\n", 2)
    assert begin == ""
    facts: Raw = yaml.safe_load(block)
    return facts


def test_the_front_matter_is_that_of_a_quantized_model(tmp_path: Path) -> None:
    card = card_of(tmp_path, quantize=QUANTIZE)
    assert front_matter(card) == {
        "base_model": "Snowflake/snowflake-arctic-instruct",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "library_name": "tensorrt-llm",
        "pipeline_tag": "text-generation",
        "tags": ["arctic", "moe", "tensorrt-llm", "fp8", "quantized"],
    }
    (tmp_path / "README.md").write_text(card)
    assert is_own_card(tmp_path / "README.md") and card.splitlines()[1] == CARD_MARK


@pytest.mark.parametrize("name", ["my-arctic", "yes", "a: b", "- [x", "#", "café"])
def test_another_model_is_named_and_its_license_is_not_guessed(tmp_path: Path, name: str) -> None:
    facts = front_matter(card_of(tmp_path, quantize={**QUANTIZE, "recipe": {"model_dir": f"/models/{name}"}}))
    assert (facts["base_model"], facts["license"]) == (name, "unknown")


def test_what_is_not_known_is_not_in_the_front_matter(tmp_path: Path) -> None:
    facts = front_matter(card_of(tmp_path, None))
    assert "base_model" not in facts and facts["tags"] == ["arctic", "moe", "tensorrt-llm"]


def test_what_is_not_measured_is_said_with_the_commands(tmp_path: Path) -> None:
    card = card_of(tmp_path, quantize=QUANTIZE)
    assert card.count("not measured |") == 7
    assert "    arctic-trt verify . --against snowflake-arctic-instruct\n" in card
    assert "    arctic-trt eval . --against snowflake-arctic-instruct\n" in card


def test_the_numbers_are_those_of_the_records(tmp_path: Path) -> None:
    card = card_of(tmp_path, quantize=QUANTIZE, verify=VERIFY, evaluate=EVALUATE)
    assert "not measured" not in card and "What is not measured yet" not in card
    for line in (
        "| verification | passed (structure and every matrix, byte by byte against snowflake-arctic-instruct) |",
        "| perplexity | 6.4137 |",
        "| perplexity of the original | 6.3871, a change of +0.42 % |",
        "| KL divergence, mean | 0.01172 nats |",
        "| same likeliest token | 97.13 % |",
        "- `calib_size`: 128",
        "- Calibration text reached all but 1 of 16 experts.",
        "- It is cut for 8 ranks, no more and no fewer.",
    ):
        assert f"{line}\n" in card
    assert EVALUATE["data"]["digest"] in card and QUANTIZE["fingerprint"]["calibration_ids"] in card
    assert "mpirun -n 8 arctic-trt run" in card and "](report/tokens_per_expert.png)" in card


def test_no_path_of_the_machine_is_published(tmp_path: Path) -> None:
    card = card_of(tmp_path, quantize=QUANTIZE, verify=VERIFY, evaluate=EVALUATE)
    assert "/data" not in card and str(tmp_path) not in card and "calib/" not in card


def test_the_same_records_give_the_same_card(tmp_path: Path) -> None:
    slower = {**QUANTIZE, "seconds": 9.0, "peak_rss_bytes": 1}
    assert card_of(tmp_path / "a", quantize=QUANTIZE) == card_of(tmp_path / "b", quantize=slower)


def test_data_is_no_markup(tmp_path: Path) -> None:
    evil = "a|b\n# <b>*x*</b> [l](http://e) `c` ![i](j)"
    made = {**QUANTIZE, "version": evil, "recipe": {"calibrator": evil}, "fingerprint": {"calibration_ids": evil}}
    card = card_of(tmp_path, quantize=made, evaluate={**EVALUATE, "data": {**EVALUATE["data"], "path": evil, "digest": evil}})
    safe = r"a\|b \# \<b\>\*x\*\</b\> \[l\](http://e) \`c\` \!\[i\](j)"
    assert card.count(safe) == 4 and "<b>" not in card and "[l](" not in card.replace(r"\[l\](", "")
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        CARD_MARK,
        "# ckpt",
        *("## How it was made", "## How to run it", "## Quality", "## Limits"),
    ]
