"""Death in the middle of an evaluation: the same command completes it, and finds the same numbers."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Finished
from tests.faults.dying import Death, run_and_die
from tests.support.checkpoints import SMALL, random_checkpoint, random_ids, write_samples
from tests.support.jobs import quantize

ArcticTrt = Callable[..., Finished]
FIGURES = ("nll", "kl_mean", "kl_max", "top1_agreement", "hidden_error", "reference")


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    """An evaluation of four layers."""
    model = random_checkpoint(tmp_path / "model", {**SMALL, "num_hidden_layers": 4})
    data = write_samples(tmp_path / "data.jsonl", random_ids(SMALL["vocab_size"], [8, 8, 5]))
    quantize(model, tmp_path / "checkpoint", calib_dataset=str(data), tp_size=2)
    words = [tmp_path / "checkpoint", "--against", model, "--data", data, "--work_dir", tmp_path / "work", "-q"]
    return ["eval", *map(str, words)]


def figures(tmp_path: Path) -> dict[str, Any]:
    report = json.loads((tmp_path / "checkpoint" / "report" / "eval.json").read_text())
    return {**{name: report[name] for name in FIGURES}, "resumed": report["resumed_layers"] > 0}


def test_killed_at_any_moment_the_same_command_finds_the_same(argv: list[str], tmp_path: Path, arctic_trt: ArcticTrt) -> None:
    finished = run_and_die(argv)
    assert finished.code == 0
    expected, resumed = figures(tmp_path), 0
    renames = [index for index, name in enumerate(finished.changes) if name in ("replace", "unlink")]
    for moment in renames[::2]:
        shutil.rmtree(tmp_path / "work")
        (tmp_path / "checkpoint" / "report" / "eval.json").unlink(missing_ok=True)
        assert run_and_die(argv, Death(moment)).code == -signal.SIGKILL
        assert arctic_trt(*argv).code == 0, f"after death at change {moment}, {finished.changes[moment]}"
        found = figures(tmp_path)
        assert {**found, "resumed": False} == expected and list((tmp_path / "work").iterdir()) == []
        resumed += found["resumed"]
    assert resumed >= 3


def test_an_interruption_says_how_to_go_on(argv: list[str], arctic_trt: ArcticTrt, tmp_path: Path) -> None:
    finished = run_and_die(argv)
    syncs = [index for index, name in enumerate(finished.changes) if name == "fsync"]
    assert run_and_die(argv, Death(syncs[len(syncs) // 2], signal=signal.SIGINT)).code == 130
    assert arctic_trt(*argv).code == 0 and figures(tmp_path)["resumed"]
