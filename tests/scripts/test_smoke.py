"""``scripts/smoke_8gpu.sh`` where a stand-in plays TensorRT-LLM: it runs through, and it does not let wrong answers pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trtllm_standin.fixtures import install_standin

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "smoke_8gpu.sh"
SIZES = "--hidden_size 256 --num_attention_heads 8 --intermediate_size 128 --vocab_size 512 --prompts 4"


def smoke(environ: dict[str, str], **settings: str) -> subprocess.CompletedProcess[str]:
    env = {**environ, "OMP_NUM_THREADS": "1", **settings}
    env["PATH"] = os.pathsep.join((env["PATH"].split(os.pathsep)[0], str(Path(sys.executable).parent), env["PATH"]))
    return subprocess.run([SCRIPT], env=env, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT)


def lines(done: subprocess.CompletedProcess[str], verdict: str) -> list[str]:
    return [line.split("  ")[1].strip() for line in done.stdout.splitlines() if line.startswith(verdict)]


@pytest.mark.timeout(240)  # a dozen programs one after another, on machines that have other work too
def test_wrong_answers_fail_and_everything_else_passes(tmp_path: Path) -> None:
    """The stand-in's tokens are not the model's; its builds and streams are as they should be."""
    standin = install_standin(tmp_path / "standin", gpus=2)
    work = tmp_path / "work"
    done = smoke(standin.env, RANKS="2", WORK=str(work), WIDEN="4", STEPS="doctor halves text")
    assert done.returncode == 1 and lines(done, "FAIL") == ["text: tokens"], done.stdout + done.stderr
    assert lines(done, "PASS") == [
        *("doctor", "tiny: widen", "tiny: prompts", "tiny: quantize"),
        *("halves: first", "halves: second", "again: nothing to do"),
        *("texts: build torch", "texts: run torch", "texts: run torch on its own text", "text"),
        *("text, streamed", "streamed or not: equal"),
    ]
    assert done.stdout.splitlines()[-1] == f"13 passed, 1 failed; logs in {work}/logs"
    assert len(list((work / "logs").glob("*.log"))) == 12
    assert_it_lets_right_answers_pass(work)


def assert_it_lets_right_answers_pass(work: Path) -> None:
    """Were the TensorRT engine's tokens the torch engine's, the line that failed would pass: the logits are of the right rows."""
    reference = work / "reference"
    words = ["tokens", work / "texts.npy", *[reference / "run.json"] * 2, reference / "logits.npy"]
    command = [sys.executable, ROOT / "scripts" / "compare_runs", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("PASS  tokens"), done.stdout
    prompts, own = np.load(work / "texts.npy"), np.load(reference / "logits.npy")
    for row, output in enumerate(json.loads((reference / "run.json").read_text())["outputs"]):
        first = (prompts[row] >= 0).sum() - 1
        assert own[row, first : first + len(output["token_ids"])].argmax(-1).tolist() == output["token_ids"]


def test_after_a_failure_the_others_go_on_a_line_each(tmp_path: Path) -> None:
    standin = install_standin(tmp_path / "standin", gpus=2, fail_rank=1)
    work = tmp_path / "work"
    done = smoke(standin.env, RANKS="2", WORK=str(work), STEPS="wide", LAYERS="1", EXPERTS="4", WIDTH=SIZES)
    assert done.returncode == 1
    assert lines(done, "FAIL") == ["wide: build TensorRT", "wide: run TensorRT", "wide: logits", "wide: tokens"]
    assert {"wide: synthesize", "wide: quantize", "wide: run torch on its own text"} <= set(lines(done, "PASS"))
    build, run, logits, _, summary = [line for line in done.stdout.splitlines() if not line.startswith("PASS")]
    assert f"expected exit code 0, found 1; {work}/logs/04-wide--build-TensorRT.log: arctic-trt: error: Rank 1" in build
    assert "arctic-trt: error:" in run and "trt.npy" in logits
    assert summary == f"5 passed, 4 failed; logs in {work}/logs"


def test_without_the_library_it_refuses_in_a_sentence(tmp_path: Path) -> None:
    done = smoke(dict(os.environ), WORK=str(tmp_path / "work"))
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "this Python has no tensorrt_llm" in done.stderr and not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("settings", "code", "complaint"),
    [
        ({"WORK": "."}, 3, "is there already; remove it"),
        ({"STEPS": "doctro"}, 2, "STEPS names doctro, which is no step"),
        ({"RANKS": "3"}, 2, "RANKS is 3, expected 2, 4 or 8"),
    ],
)
def test_it_refuses_before_it_begins(settings: dict[str, str], code: int, complaint: str, tmp_path: Path) -> None:
    standin = install_standin(tmp_path / "standin", gpus=2)
    done = smoke(standin.env, **{"RANKS": "2", "WORK": str(tmp_path / "work"), **settings})
    assert done.returncode == code and complaint in done.stderr and done.stdout == ""
    assert not (tmp_path / "work").exists()


def test_its_help_names_every_setting() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {name}=" in done.stdout for name in ("RANKS", "WORK", "WIDEN", "EXPERTS", "LAYERS", "WIDTH", "STEPS"))
    assert not done.stdout.startswith("#")
