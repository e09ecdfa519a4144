"""The program itself: help, commands, exit codes, and what it takes to start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import arctic_trt as package
from arctic_trt.cli import main as main_module
from arctic_trt.errors import ArcticTrtError, CheckpointError, RefusedError, UsageError, VerificationError
from tests.conftest import Finished

HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "yaml",
    "rich",
    "transformers",
    "safetensors",
    "mpi4py",
    "modelopt",
    "tensorrt_llm",
    "matplotlib",
    "lm_eval",
)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_commands_and_exit_codes(word: str, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(word)
    assert (done.code, done.err) == (0, "")
    text = " ".join(done.out.split())
    for expected in (
        "quantize Quantize a Hugging Face Arctic checkpoint to a TensorRT-LLM checkpoint.",
        "build Build an engine directory from a TensorRT-LLM checkpoint.",
        "bench Measure latency and throughput of an engine or a server.",
        "lm_eval Run EleutherAI's lm-evaluation-harness on an engine, alone or under mpirun.",
        "run Generate text with an engine, alone or under mpirun.",
        "doctor Say what this machine has, which steps work on it, and what to do next.",
        "0 done 2 wrong usage or configuration 4 verification failed 1 failed 3 refused before starting 130 interrupted",
        "Every flag is accepted with underscores and with hyphens.",
    ):
        assert expected in text


def test_version(arctic_trt: Callable[..., Finished]) -> None:
    assert arctic_trt("--version") == Finished(0, f"arctic-trt, version {package.__version__}\n", "")


def test_no_command_shows_the_help_on_stderr(arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt()
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: arctic-trt [OPTIONS] COMMAND") and "error" not in done.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["--nonsense"], "No such option"),
        (["quantize", "--tp_sise", "8"], "No such option '--tp_sise'"),
        (["quantize", "--tp_size"], "'--tp_size' requires an argument"),
        (["quantize", "--tp_size", "many"], "Invalid value for '--tp_size': 'many' is not a valid integer"),
        (["quantize", "--qformat", "int4"], "Invalid value for '--qformat': 'int4' is not one of 'fp8', 'full_prec'"),
        (["quantize", "stray"], "Got unexpected extra argument (stray)"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words: list[str], complaint: str, arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("arctic-trt: error: ") and done.err.count("\n") == 1
    assert complaint.replace("'", "") in done.err.replace("'", "") and "--help." in done.err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ArcticTrtError("It broke.", "Mend it."), 1, "It broke. Mend it."),
        (CheckpointError("It broke."), 1, "It broke."),
        (UsageError("It broke."), 2, "It broke."),
        (RefusedError("It broke."), 3, "It broke."),
        (VerificationError("It broke."), 4, "It broke."),
        (ArcticTrtError("Over\n  several\n  lines."), 1, "Over several lines."),
        (ValueError("surprise"), 1, "Unexpected ValueError: surprise (-v shows where)."),
        (KeyboardInterrupt(), 130, "Interrupted. To go on: arctic-trt quantize --model_dir 'a b'"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_is_one_sentence_and_an_exit_code(
    error: BaseException, code: int, message: str, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(
        main_module.cli,
        "get_command",
        lambda ctx, name: click.Command(name, callback=fail, params=[click.Option(["--model_dir"])]),
    )
    done = arctic_trt("quantize", "--model_dir", "a b")
    assert (done.code, done.out, done.err.strip()) == (code, "", f"arctic-trt: error: {message}")


def test_a_traceback_only_with_verbose(arctic_trt: Callable[..., Finished], tmp_path: Path) -> None:
    words = ("quantize", "--model_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "Traceback" not in arctic_trt(*words).err
    for flag in ("-v", "--verbose"):
        assert "Traceback" in arctic_trt(*words, flag).err


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["quantize", "--help"], ["lm_eval", "--help"], ["bench", "online", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = (
        "import sys; from arctic_trt.cli.main import run_cli; code = run_cli(sys.argv[1:]);"
        f"loaded = sorted(set({HEAVY}) & set(sys.modules)); print(loaded, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == "[]\n"


def test_help_answers_in_less_than_half_a_second() -> None:
    """The best of three, so that a busy machine does not decide."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "arctic_trt", "--help"], stdout=subprocess.DEVNULL, cwd=ROOT, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
