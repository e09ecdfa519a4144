"""``arctic-trt verify`` from the command line, and the check at the end of ``quantize``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished
from tests.report.verify.damages import DAMAGES
from tests.support.jobs import Job, quantize

Run = Callable[..., Finished]


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tiny_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify") / "checkpoint"
    quantize(tiny_model, directory, calib_dataset=str(tiny_samples), tp_size=4, moe_ep_size=2)
    return directory


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    DAMAGES["KV scale missing"](copy, checkpoint)
    return copy


def test_what_is_right(arctic_trt: Run, checkpoint: Path, tiny_model: Path) -> None:
    done = arctic_trt("verify", checkpoint, "--against", tiny_model, "--full", "--no_report")
    assert done.code == 0 and "Verified" in done.out and "errors    0" in done.out
    assert "Most noise from quantization" in done.out and " dB" in done.out


def test_what_is_wrong_ends_with_four_and_a_table(arctic_trt: Run, damaged: Path) -> None:
    done = arctic_trt("verify", damaged, "--no_report")
    assert done.code == 4 and "Findings" in done.out and "Not verified" in done.out
    name = "transformer.layers.1.attention.kv_cache_scaling_factor"
    assert f"missing  rank0.safetensors  rank0.safetensors lacks tensor {name}." in done.out
    assert done.err.count("arctic-trt: error:") == 1
    assert f"{damaged} is not right: rank0.safetensors lacks tensor {name}. and 3 more Copy it again" in done.err


def test_json(arctic_trt: Run, checkpoint: Path, damaged: Path, tiny_model: Path) -> None:
    good = json.loads(arctic_trt("verify", checkpoint, "--against", tiny_model, "--json", "--no_report").out)
    assert good["passed"] and good["findings"] == [] and len(good["worst"]) == 10
    first, last = ["against", "share", "passed", "errors", "warnings", "findings"], ["tensors", "bytes_read", "path", "seconds"]
    assert list(good) == [*first, "worst", "sqnr", *last]
    assert (good["against"], good["share"]) == (str(tiny_model), 1.0)
    assert {tuple(row) for row in good["sqnr"]} == {("layer", "site", "min_db", "mean_db", "count")}
    done = arctic_trt("verify", damaged, "--json", "--no_report")
    bad = json.loads(done.out)
    assert done.code == 4 and not bad["passed"] and bad["errors"] == 4
    assert list(bad["findings"][0]) == ["severity", "kind", "file", "tensor", "sentence"]


def test_many_findings_are_cut(arctic_trt: Run, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    DAMAGES["config of twice the ranks"](copy, checkpoint)
    done = arctic_trt("verify", copy, "--no_report")
    assert done.code == 4 and "Findings (20 of " in done.out and done.out.count("rank1.safetensors  ") <= 20


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--sample", "0.5", "--full"], "--sample and --full exclude each other"),
        (["--sample", "0"], "--sample"),
        (["--sample", "2"], "--sample"),
    ],
)
def test_wrong_usage(words: list[str], complaint: str, arctic_trt: Run, checkpoint: Path) -> None:
    done = arctic_trt("verify", checkpoint, *words)
    assert (done.code, done.out) == (2, "") and complaint in done.err


def test_nothing_there(arctic_trt: Run, tmp_path: Path) -> None:
    assert arctic_trt("verify", tmp_path / "none").code == 2
    assert arctic_trt("verify", tmp_path).code == 4


def test_quantize_checks_what_it_wrote(job: Job, arctic_trt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arctic_trt(*job.argv()).code == 0
    again = arctic_trt(*job.argv())
    assert again.code == 0 and "nothing to do" in again.err
    path = job.output_dir / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    at = data.index(b"input_layernorm")
    data[at] ^= 0x20
    path.write_bytes(data)
    done = arctic_trt(*job.argv())
    assert done.code == 4 and "is not right: rank0.safetensors" in done.err
    assert arctic_trt(*job.argv(), "--no_verify").code == 0
