"""``arctic-trt build`` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.support.jobs import quantize, tree


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("build") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=2)
    return directory


def test_the_official_command(arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    done = arctic_trt(
        *("build", "--checkpoint_dir", checkpoint, "--output_dir", engine),
        *("--gpt_attention_plugin", "bfloat16", "--gemm_plugin", "bfloat16", "--workers", 8),
    )
    assert done.code == 0
    assert "Built" in done.out and "rank 1 of 2" in done.err
    assert "using the torch backend" in done.err
    assert "no plugins; without effect: --gpt_attention_plugin, --gemm_plugin" in done.err
    assert json.loads((engine / "config.json").read_text())["build_config"]["max_batch_size"] == 256


def test_json_is_one_object(arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path) -> None:
    done = arctic_trt(
        "build", "--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "engine", "--max-batch-size", 3, "--json"
    )
    value = json.loads(done.out)
    assert done.code == 0 and value["output_dir"] == str(tmp_path / "engine")
    assert (value["backend"], value["ranks"], value["build_config"]["max_batch_size"]) == ("torch", 2, 3)
    assert value["bytes_written"] == sum(path.stat().st_size for path in (tmp_path / "engine").glob("rank*"))


def test_a_dry_run_writes_nothing(arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path) -> None:
    done = arctic_trt("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine", "--dry_run", "--json")
    value = json.loads(done.out)
    assert done.code == 0 and list(tmp_path.iterdir()) == []
    assert value["recipe"]["checkpoint_dir"] == str(checkpoint)
    arctic_trt("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine")
    assert value["output_bytes"] == sum(path.stat().st_size for path in (tmp_path / "engine").glob("rank*"))


def test_a_recipe_file_and_a_flag_over_it(arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"checkpoint_dir: {checkpoint}\nmax_batch_size: 5\nmax_num_tokens: 64\n")
    done = arctic_trt("build", "--config", recipe, "--output_dir", tmp_path / "engine", "--max_num_tokens", 32, "--json")
    limits = json.loads(done.out)["build_config"]
    assert (limits["max_batch_size"], limits["max_num_tokens"]) == (5, 32)


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--backend", "tensorrt_llm"], 3, "tensorrt_llm, which is not installed. Install it on a CUDA machine"),
        (["--max_seq_len", "5000"], 2, "--max_seq_len 5000 exceeds max_position_embeddings=4096"),
        (["--workers", "0"], 2, "--workers 0 is not valid"),
        (["--max_beam_width", "4"], 2, "--max_beam_width 4 is not supported"),
        (["--backend", "onnx"], 2, "--backend"),
    ],
)
def test_refusals(
    words: list[str], code: int, complaint: str, arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path
) -> None:
    done = arctic_trt("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine", *words)
    assert (done.code, done.out) == (code, "")
    assert complaint in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint(arctic_trt: Callable[..., Finished], tiny_model: Path, tmp_path: Path) -> None:
    done = arctic_trt("build", "--checkpoint_dir", tmp_path / "absent", "--output_dir", tmp_path / "engine")
    assert done.code == 2 and "config.json does not exist. Point --checkpoint_dir" in done.err
    done = arctic_trt("build", "--checkpoint_dir", tiny_model, "--output_dir", tmp_path / "engine")
    assert done.code == 2 and "lacks the key" in done.err
    done = arctic_trt("build", "--checkpoint_dir", tiny_model)
    assert done.code == 2 and "--output_dir is required" in done.err


def test_an_occupied_directory(arctic_trt: Callable[..., Finished], checkpoint: Path, tmp_path: Path) -> None:
    words = ("build", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "engine")
    assert arctic_trt(*words).code == 0
    before = tree(tmp_path / "engine")
    done = arctic_trt(*words, "--max_batch_size", 1)
    assert done.code == 3 and "--overwrite" in done.err and tree(tmp_path / "engine") == before
    assert arctic_trt(*words, "--max_batch_size", 1, "--overwrite").code == 0
