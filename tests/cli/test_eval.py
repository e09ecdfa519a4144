"""``arctic-trt eval`` from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arctic_trt.report.page.records import read_records
from tests.conftest import Finished
from tests.support.jobs import quantize

Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def original(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("eval") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=2)
    return directory


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def test_a_checkpoint_against_its_original(arctic_trt: Run, checkpoint: Path, tiny_model: Path, tiny_samples: Path) -> None:
    done = arctic_trt("eval", checkpoint, "--against", tiny_model, "--data", tiny_samples, "--no_report")
    assert done.code == 0
    for word in (
        "Evaluated",
        "perplexity",
        "original's perplexity",
        "KL divergence",
        "top-1 agreement",
        "error of hidden states",
    ):
        assert word in done.out
    assert "2 layers, 5 samples, 106 tokens, hidden states in memory" in done.err
    assert "layer 1/2  read " in done.err and "layer 2/2  read " in done.err and "  eta 0.0 s" in done.err


def test_a_model_alone(arctic_trt: Run, tiny_model: Path, tiny_samples: Path, checkpoint: Path) -> None:
    done = arctic_trt("eval", tiny_model, "--data", tiny_samples, "-q", "--json")
    found = json.loads(done.out)
    assert done.err == "" and found["against"] is None and found["perplexity"] > 1 and found["kl_mean"] is None


def test_json_has_everything(arctic_trt: Run, checkpoint: Path, tiny_model: Path, tiny_samples: Path) -> None:
    found = json.loads(
        arctic_trt("eval", checkpoint, "--against", tiny_model, "--data", tiny_samples, "--json", "--no_report").out
    )
    assert list(found) == [
        *("path", "against", "data", "nll", "perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement", "reference"),
        *("hidden_error", "sensitivity", "seconds", "peak_rss_bytes", "bytes_read", "resumed_layers", "hidden_states_on_disk"),
        "version",
    ]


def test_a_sensitivity_says_what_to_do_next(arctic_trt: Run, checkpoint: Path, tiny_model: Path, tiny_samples: Path) -> None:
    words = ["--against", tiny_model, "--data", tiny_samples, "--sensitivity", "--sites", "attention", "--sites", "experts"]
    done = arctic_trt("eval", checkpoint, *words, "--size_budget", "100%")
    assert done.code == 0 and "What costs most" in done.out and "Layer by layer (7 of 7)" in done.out
    recipe = checkpoint / "report" / "sensitivity.yaml"
    assert f"arctic-trt quantize --config {recipe} --output_dir NEW" in done.out
    kept = {line.split()[1] for line in done.out.splitlines() if line.endswith("bf16")}
    assert kept == {"attention", "experts"}
    records = read_records(checkpoint)
    assert records.problems == () and records.evaluation and records.evaluation.sensitivity
    page = (checkpoint / "report" / "report.html").read_text()
    assert f"report: {checkpoint / 'report' / 'report.html'}" in done.err and f"{records.evaluation.perplexity:.4f}" in page
    assert (checkpoint / "report" / "sensitivity.png").exists() and "perplexity |" in (checkpoint / "README.md").read_text()


def test_flags_may_come_from_a_file(arctic_trt: Run, checkpoint: Path, tiny_samples: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "eval.yaml"
    recipe.write_text(f"data: {tiny_samples}\nnum_samples: 2\n")
    found = json.loads(arctic_trt("eval", checkpoint, "--config", recipe, "--json", "--no_report").out)
    assert found["data"]["samples"] == 2


def test_a_budget_is_checked_before_the_work(arctic_trt: Run, checkpoint: Path, tiny_model: Path, tiny_samples: Path) -> None:
    words = ["--against", tiny_model, "--data", tiny_samples, "--sensitivity", "--size_budget", "0%"]
    done = arctic_trt("eval", checkpoint, *words)
    assert done.code == 2 and "--size_budget '0%' is not a share" in done.err and "layer 1" not in done.err


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--data", "none.jsonl"], 2, "--data none.jsonl is neither a file nor one of"),
        (["--sensitivity"], 2, "Give the checkpoint, and --against MODEL_DIR."),
        (["--sites", "embedding"], 2, "'embedding' is not one of"),
        (["--memory_budget", "1MB"], 3, "Raise --memory_budget"),
        (["--max_seq_length", "1"], 2, "--max_seq_length 1 is not valid"),
        (["--against", "nowhere"], 2, "nowhere"),
    ],
)
def test_wrong_usage(words: list[str], code: int, complaint: str, arctic_trt: Run, checkpoint: Path, tiny_samples: Path) -> None:
    done = arctic_trt("eval", checkpoint, "--data", tiny_samples, *words)
    assert (done.code, done.out) == (code, "") and complaint in done.err


def test_nothing_there(arctic_trt: Run, tmp_path: Path) -> None:
    done = arctic_trt("eval", tmp_path)
    assert done.code == 2 and "config.json" in done.err


def test_a_damaged_file_is_named(arctic_trt: Run, checkpoint: Path, tiny_samples: Path) -> None:
    path = checkpoint / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = arctic_trt("eval", checkpoint, "--data", tiny_samples)
    assert done.code == 1 and "rank1.safetensors is truncated" in done.err
