"""``scripts/synthesize_arctic``: an Arctic like the real one in everything but sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.model.config import parse_config
from arctic_trt.model.names import hf_shapes
from tests.support.jobs import quantize, read_ranks

ROOT = Path(__file__).parents[2]
SMALL = "--hidden_size 256 --num_attention_heads 8 --intermediate_size 96 --vocab_size 300 --experts 4 --prompts 3 --tokens 7"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "model"
    script = ROOT / "scripts" / "synthesize_arctic"
    subprocess.run([sys.executable, script, "--output_dir", directory, *SMALL.split()], check=True, capture_output=True)
    return directory


def test_every_tensor_is_there_and_all_differ(model: Path) -> None:
    source = HfCheckpoint(model)
    tensors = load_file(model / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == hf_shapes(source.config)
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name and name.endswith("w1.weight")]
    assert len(experts) == 8 and not any(a.equal(b) for index, a in enumerate(experts) for b in experts[:index])
    assert source.kv_fold is None


def test_ids_are_within_the_vocabulary(model: Path) -> None:
    prompts = np.load(model / "prompts.npy")
    assert prompts.shape == (3, 7) and prompts.min() >= 0 and prompts.max() < 300


def test_it_can_be_quantized_with_its_own_samples(model: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "out", calib_dataset=str(model / "samples.jsonl"), tp_size=2)
    assert report["experts_without_tokens"] == [] and len(read_ranks(tmp_path / "out")) == 2


def test_the_default_is_arctics_true_width() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from synthetic import BASE, FULL_WIDTH
    finally:
        sys.path.pop(0)
    config = parse_config({**BASE, **FULL_WIDTH})
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (7168, 56, 8)
    assert (config.intermediate_size, config.vocab_size, config.num_experts_per_tok) == (4864, 32000, 2)
