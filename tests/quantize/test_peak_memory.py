"""Memory does not grow with the checkpoint: neither with its experts nor with its layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arctic_trt.checkpoint.contract import rank_file
from arctic_trt.checkpoint.layout import TensorSpec, plan_layout
from arctic_trt.checkpoint.tensors import bytes_of
from tests.support.checkpoints import TINY, Config, random_ids, shapes_of, write_samples

ROOT = Path(__file__).parents[2]
WIDTH: Config = {**TINY, "hidden_size": 512, "intermediate_size": 704, "vocab_size": 1024}
TOLERANCE, CONSTANT_BYTES = 1.05, 4 << 20
# Started by a small process: to the kernel, a child's highest resident size includes what its parent held when it forked.
MEASURE = (
    "import os, resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=2);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"
)


def write_model(path: Path, num_experts: int, num_layers: int) -> int:
    """A checkpoint of this width, its tensors slices of one block of random numbers; returns its size."""
    config = {**WIDTH, "num_local_experts": num_experts, "num_hidden_layers": num_layers}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    layout = plan_layout([TensorSpec(name, "BF16", shape) for name, shape in shapes_of(config).items()], {"format": "pt"})
    draw = torch.Generator().manual_seed(0)
    block = bytes_of((torch.randn(1 << 20, generator=draw) * 0.04).bfloat16())
    with (path / "model.safetensors").open("wb") as file:
        file.write(layout.header)
        for number, spec in enumerate(layout.specs.values()):
            begin = 2 * 64 * (number % 1000)
            assert begin + spec.num_bytes <= len(block)
            file.write(block[begin : begin + spec.num_bytes])
    return layout.total_bytes


def measure(*words: object) -> subprocess.CompletedProcess[str]:
    """Run ``arctic-trt WORDS...``: stdout is its highest resident size, stderr all that it said."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", MEASURE, sys.executable, "-m", "arctic_trt", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def peak_of(model_dir: Path, samples: Path, output_dir: Path) -> int:
    words = ["--model_dir", model_dir, "--output_dir", output_dir, "--calib_dataset", samples, "--tp_size", 2, "--batch_size", 4]
    done = measure("quantize", "--no_report", "-q", *words)
    measured = int(done.stdout)
    report = json.loads((output_dir / "report" / "quantize.json").read_text())
    assert report["peak_rss_bytes"] == pytest.approx(measured, rel=0.02), "what it says of itself"
    return measured


def test_peak_memory_is_flat(tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "calib.jsonl", random_ids(WIDTH["vocab_size"], [64] * 16))
    peaks: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for experts, layers in ((16, 2), (32, 2), (64, 2), (32, 4)):
        model_dir, output_dir = tmp_path / f"model-{experts}-{layers}", tmp_path / f"out-{experts}-{layers}"
        sizes[experts, layers] = write_model(model_dir, experts, layers)
        peaks[experts, layers] = peak_of(model_dir, samples, output_dir)
        for path in (model_dir / "model.safetensors", *(output_dir / rank_file(rank) for rank in (0, 1))):
            path.unlink()
    smallest = peaks[16, 2]
    assert sizes[64, 2] - sizes[16, 2] > 8 * CONSTANT_BYTES + 4 * (TOLERANCE - 1) * smallest, "growth would show"
    assert max(peaks.values()) <= TOLERANCE * smallest + CONSTANT_BYTES, f"{peaks}, checkpoints of {sizes}"
