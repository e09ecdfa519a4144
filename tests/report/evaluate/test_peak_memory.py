"""An evaluation's memory grows neither with the layers nor with the experts of the model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.quantize.test_peak_memory import CONSTANT_BYTES, TOLERANCE, WIDTH, measure, write_model
from tests.support.checkpoints import random_ids, write_samples


def peak_of(model_dir: Path, samples: Path, work_dir: Path) -> int:
    words = [model_dir, "--against", model_dir, "--data", samples, "--work_dir", work_dir, "--json"]
    done = measure("eval", "-q", *words)
    assert json.loads(done.stderr)["kl_max"] == 0.0, "the two sides are the same model"
    return int(done.stdout)


def test_peak_memory_is_flat(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "data.jsonl", random_ids(WIDTH["vocab_size"], [64] * 8))
    peaks: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for experts, layers in ((16, 2), (64, 2), (16, 8)):
        model_dir = tmp_path / f"model-{experts}-{layers}"
        sizes[experts, layers] = write_model(model_dir, experts, layers)
        peaks[experts, layers] = peak_of(model_dir, samples, tmp_path / "work")
        (model_dir / "model.safetensors").unlink()
    smallest = peaks[16, 2]
    assert sizes[16, 8] - sizes[16, 2] > 8 * CONSTANT_BYTES + 4 * (TOLERANCE - 1) * smallest, "growth would show"
    assert max(peaks.values()) <= TOLERANCE * smallest + CONSTANT_BYTES, f"{peaks}, checkpoints of {sizes}"
