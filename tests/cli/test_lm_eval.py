"""``arctic-trt lm_eval``: the harness's own command line, and a sentence for what cannot be run.

That it runs, alone and on several ranks, is in ``tests/runtime/test_harness.py``.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.support.engines import build_engine
from tests.support.jobs import quantize

TASK = ("--tasks", "arctic_choice")


@pytest.fixture(scope="module")
def engine(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work_dir = tmp_path_factory.mktemp("lm_eval")
    quantize(small_model, work_dir / "checkpoint", qformat="full_prec", tp_size=1)
    return build_engine(work_dir / "checkpoint", work_dir / "engine")


@pytest.fixture(autouse=True)
def harness_logger() -> Iterator[None]:
    """The harness configures its logger; every test finds it as it was."""
    logger, utils = logging.getLogger("lm_eval"), sys.modules.get("lm_eval.utils")
    before = logger.handlers[:], logger.level, logger.propagate, getattr(utils, "_LOGGING_CONFIGURED", False)
    yield
    logger.handlers[:], logger.level, logger.propagate = before[:3]
    if (utils := sys.modules.get("lm_eval.utils")) is not None:
        utils._LOGGING_CONFIGURED = before[3]  # type: ignore[attr-defined]


def test_help_says_how_to_run_it_on_several_ranks(arctic_trt: Callable[..., Finished]) -> None:
    done = arctic_trt("lm-eval", "--help")
    assert done.code == 0 and "mpirun -n 8 --allow-run-as-root arctic-trt lm_eval --model arctic_trt" in done.out
    assert "Missing argument 'ARGUMENTS ...'" in arctic_trt("lm_eval").err


@pytest.mark.parametrize("missing", ["lm_eval", "lm_eval._cli"])
def test_without_the_harness(missing: str, arctic_trt: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    done = arctic_trt("lm_eval", "--model", "arctic_trt", *TASK)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("arctic-trt: error: The package lm-eval is not installed, or not the version")
    assert done.err.endswith("pip install 'arctic-trt[eval]'\n")


class TestWithTheHarness:
    """What needs the package."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("lm_eval")

    def test_the_harness_s_own_help(self, arctic_trt: Callable[..., Finished]) -> None:
        done = arctic_trt("lm_eval", "run", "--help")
        assert done.code == 0 and "lm-eval run --model <model>" in done.out and "--num_fewshot" in done.out

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--colour", "red"], "lm-eval: unrecognized arguments: --colour red. See arctic-trt lm_eval run --help."),
            (["--seed", "1,2,3,4,5"], "lm-eval: argument --seed"),
            (["--log_samples"], "lm-eval: Specify --output_path if providing --log_samples"),
            (["--config", "/absent.yaml"], "lm-eval: Config file not found: /absent.yaml."),
            ([], "--model arctic_trt needs an engine. Give --model_args engine_dir=DIRECTORY."),
            (["--model_args", "tokenizer_dir=x"], "--model arctic_trt needs an engine."),
            (["--model_args", "engine_dir=/absent"], "/absent/config.json does not exist"),
        ],
    )
    def test_wrong_usage_is_one_line(self, words: list[str], complaint: str, arctic_trt: Callable[..., Finished]) -> None:
        done = arctic_trt("lm_eval", "--model", "arctic_trt", *TASK, *words)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"arctic-trt: error: {complaint}") and done.err.count("\n") == 1

    def test_an_engine_of_tensorrt_is_refused_before_anything_is_loaded(
        self, engine: Path, tmp_path: Path, arctic_trt: Callable[..., Finished]
    ) -> None:
        shutil.copytree(engine, tmp_path / "engine")
        config = json.loads((engine / "config.json").read_text())
        (tmp_path / "engine" / "config.json").write_text(json.dumps({**config, "backend": "tensorrt_llm"}))
        done = arctic_trt("lm_eval", "--model", "arctic_trt", "--model_args", f"engine_dir={tmp_path / 'engine'}", *TASK)
        assert done.code == 3 and "only engines of the torch backend can stay open and score text" in done.err

    @pytest.mark.parametrize(("code", "expected"), [(0, 0), (None, 0), (1, 1), ("no", 1)])
    def test_the_harness_s_exit_code(
        self,
        code: Any,
        expected: int,
        engine: Path,
        arctic_trt: Callable[..., Finished],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from lm_eval._cli import HarnessCLI  # type: ignore[import-not-found]

        def leave(program: object, asked: Any) -> None:
            assert (asked.model, asked.model_args, asked.tasks) == ("arctic_trt", {"engine_dir": str(engine)}, ["arctic_choice"])
            sys.exit(code)

        monkeypatch.setattr(HarnessCLI, "execute", leave)
        before = sys.argv
        done = arctic_trt("lm_eval", "--model", "arctic_trt", "--model_args", f"engine_dir={engine}", *TASK)
        assert done.code == expected and sys.argv is before
        assert ("lm-eval ended with exit code" in done.err) == bool(expected)
