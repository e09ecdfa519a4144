"""The operator's page says what is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from arctic_trt.checkpoint.contract import QuantFormat, plan_files
from arctic_trt.model.config import read_config
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.quantize.memory import plan_memory
from tests.support.command_lines import fenced, in_text, joined_lines, parse

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
COMMANDS = fenced(PAGE)
ARCTIC = read_config(ROOT / "tests" / "data" / "arctic-config")


def test_every_command_line_is_one_that_arctic_trt_takes() -> None:
    lines = list(in_text(COMMANDS))
    assert [line[0] for line in lines] == ["doctor", "plan", "quantize", "verify", "build", "run"]
    for line in lines:
        parse(line)


def test_a_flag_that_does_not_exist_would_be_noticed() -> None:
    [line] = in_text("mpirun -n 8 arctic-trt run --engine_dir e --max_output_len 8 \\\n    --no_such_flag  # comment")
    with pytest.raises(click.UsageError, match="no_such_flag"):
        parse(line)


def test_steps_hand_over_to_each_other() -> None:
    _, plan, quantize, verify, build, run = (parse(line).params for line in in_text(COMMANDS))
    assert quantize["output_dir"] == verify["path"] == build["checkpoint_dir"]
    assert verify["against"] == quantize["model_dir"]
    assert build["output_dir"] == run["engine_dir"]
    assert plan["model"] == quantize["model_dir"] == run["tokenizer_dir"]
    assert f"scripts/download_arctic {quantize['model_dir']}\n" in COMMANDS
    recipe = yaml.safe_load((ROOT / build["config"]).read_text())
    assert recipe["expects"]["tp_size"] == quantize["tp_size"] == 8


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"(?:scripts|engines|docs)/[\w./-]*\w", PAGE):
        assert (ROOT / name).exists(), name


def test_every_batch_script_service_and_job_that_is_named_exists() -> None:
    services = yaml.safe_load((ROOT / "scripts" / "docker" / "compose.yaml").read_text())["services"]
    for line in joined_lines(COMMANDS):
        words = shlex.split(line, comments=True)
        if words[:2] == ["docker", "compose"]:
            assert words[-1] in services
    [loop] = re.findall(r"^for step in (.*); do$", COMMANDS, flags=re.MULTILINE)
    one_node = ROOT / "scripts" / "kubernetes" / "one-node"
    names = {yaml.safe_load((one_node / f"{step}.yaml").read_text())["metadata"]["name"] for step in loop.split()}
    assert names == {f"arctic-trt-{step}" for step in loop.split()}


def test_settings_that_are_named_are_settings_of_the_scripts() -> None:
    scripts = "".join(path.read_text() for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix != ".pyc")
    for name in set(re.findall(r"\bARCTIC_[A-Z_]+", PAGE)):
        assert f"{name}" in scripts, name


def test_sizes_are_those_of_plan() -> None:
    quant = QuantFormat(fp8=True, kv_fp8=True)
    written = sum(layout.total_bytes for layout in plan_files(ARCTIC, plan_mapping(ARCTIC, tp_size=8), quant))
    assert f"957 → {written / 1e9:.0f} GB" in PAGE


def test_memory_of_quantize_is_that_of_plan() -> None:
    def peak(cores: int) -> float:
        return plan_memory(ARCTIC, tokens=128 * 512, batch_tokens=512, workers=cores, budget_bytes=2**40).peak_bytes / 1e9

    assert f"5.4 GB with 2, {peak(8):.1f} GB with 8, {peak(96):.0f} GB with 96" in PAGE
    assert f"{peak(2):.1f}" == "5.4"
    a_core = (peak(96) - peak(8)) / 88
    assert f"{peak(8) - 8 * a_core:.1f} GB + {a_core:.2f} GB a core" in PAGE


def test_it_says_what_nobody_has_tried() -> None:
    assert "Nobody has run these scripts on such\nmachines yet." in PAGE
