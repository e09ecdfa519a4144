"""``scripts/smoke_8gpu.sh`` where a stand-in plays TensorRT-LLM: it runs through, and it does not let wrong answers pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_wrong_answers_fail_and_everything_else_passes(tmp_path: Path) -> None:
    """The stand-in's tokens and logits are not the model's; its builds, streams and batches are as they should be."""
    standin = install_standin(tmp_path / "standin", gpus=2)
    work = tmp_path / "work"
    done = smoke(standin.env, RANKS="2", WORK=str(work), STEPS="doctor halves wide", LAYERS="1", EXPERTS="4", WIDTH=SIZES)
    assert done.returncode == 1 and lines(done, "FAIL") == ["wide: logits", "wide: tokens"], done.stdout + done.stderr
    assert {"doctor", "halves: second", "again: nothing to do", "wide: synthesize", "wide: run TensorRT"} <= set(
        lines(done, "PASS")
    )
    assert done.stdout.splitlines()[-1] == f"12 passed, 2 failed; logs in {work}/logs"
    assert len(list((work / "logs").iterdir())) == 12


def test_a_failing_step_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    standin = install_standin(tmp_path / "standin", gpus=2, fail_rank=1)
    done = smoke(standin.env, RANKS="2", WORK=str(tmp_path / "work"), STEPS="halves")
    assert done.returncode == 1
    assert lines(done, "FAIL") == ["halves: second", "again: nothing to do"] and "halves: first" in lines(done, "PASS")
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FAIL  halves: second")]
    assert "logs/03-halves--second.log: arctic-trt: error: Rank 1" in line


def test_without_the_library_it_refuses_in_a_sentence(tmp_path: Path) -> None:
    done = smoke(dict(os.environ), WORK=str(tmp_path / "work"))
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "this Python has no tensorrt_llm" in done.stderr and not (tmp_path / "work").exists()


def test_it_overwrites_nothing_and_knows_its_steps(tmp_path: Path) -> None:
    standin = install_standin(tmp_path / "standin", gpus=2)
    done = smoke(standin.env, WORK=str(tmp_path))
    assert done.returncode == 3 and "is there already; remove it" in done.stderr
    done = smoke(standin.env, RANKS="2", WORK=str(tmp_path / "work"), STEPS="doctro")
    assert done.returncode == 2 and "STEPS names doctro, which is no step" in done.stderr


def test_its_help_names_every_setting() -> None:
    done = subprocess.run([SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert all(f"  {name}=" in done.stdout for name in ("RANKS", "WORK", "EXPERTS", "LAYERS", "WIDTH", "STEPS"))
    assert not done.stdout.startswith("#")
