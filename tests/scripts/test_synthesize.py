"""``scripts/synthesize_arctic``: an Arctic like the real one in everything but sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.model import layer
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.names import hf_shapes
from tests.support.jobs import quantize, read_ranks

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "data" / "tiny-arctic"
SMALL = "--hidden_size 256 --num_attention_heads 8 --intermediate_size 96 --vocab_size 300 --experts 4 --prompts 3 --tokens 7"


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    script = ROOT / "scripts" / "synthesize_arctic"
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False)


def synthesize(directory: Path, *words: object) -> Path:
    done = run_script("--output_dir", directory, *words)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("synthetic") / "model", *SMALL.split())


def test_every_tensor_is_there_and_all_differ(model: Path) -> None:
    source = HfCheckpoint(model)
    tensors = load_file(model / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == hf_shapes(source.config)
    experts = [tensor for name, tensor in tensors.items() if ".experts." in name and name.endswith("w1.weight")]
    assert len(experts) == 8 and not any(a.equal(b) for index, a in enumerate(experts) for b in experts[:index])
    assert source.kv_fold is None


def test_the_seed_decides_weights_and_ids(model: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        again = synthesize(tmp_path / str(seed), *SMALL.split(), "--seed", seed)
        for name in ("model.safetensors", "samples.jsonl", "prompts.npy"):
            assert ((again / name).read_bytes() == (model / name).read_bytes()) == same, (seed, name)


def test_it_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    done = run_script("--output_dir", tmp_path, *SMALL.split())
    assert done.returncode == 1 and "is not empty, and nothing is deleted here" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("factor", [4, 16])
def test_the_widened_tiny_model_computes_the_same(factor: int, tmp_path: Path) -> None:
    wide = synthesize(tmp_path / "wide", "--widen", TINY, "--factor", factor)
    source, target = HfCheckpoint(TINY), HfCheckpoint(wide)
    assert target.config.head_dim == 8 * factor and target.config.head_dim >= 32
    assert target.config.intermediate_size // 8 % 16 == 0, "a rank's part of an expert, in FP8 at TP8"
    ids = torch.arange(3, 60)[None]
    expected, found = (forward(tensors(path), checkpoint.config, ids) for path, checkpoint in ((TINY, source), (wide, target)))
    assert expected.std() > 1 and torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert (wide / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All of a checkpoint, in float32."""
    loaded = {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}
    return {name: value.float() for name, value in loaded.items()}


def forward(weights: dict[str, torch.Tensor], config: ArcticConfig, ids_BT: torch.Tensor) -> torch.Tensor:
    x_BTD = F.embedding(ids_BT, weights["model.embed_tokens.weight"])
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        x_BTD = layer.decoder_layer(x_BTD, dense_of(weights, prefix), experts_of(weights, prefix, config), config)
    return layer.output_logits(x_BTD, weights["model.norm.weight"], weights["lm_head.weight"], config)


def mlp_of(weights: dict[str, torch.Tensor], prefix: str) -> layer.MlpWeights:
    return layer.MlpWeights(*(weights[f"{prefix}.w{number}.weight"] for number in (1, 2, 3)))


def experts_of(weights: dict[str, torch.Tensor], prefix: str, config: ArcticConfig) -> list[layer.MlpWeights]:
    return [mlp_of(weights, f"{prefix}.block_sparse_moe.experts.{expert}") for expert in range(config.num_local_experts)]


def dense_of(weights: dict[str, torch.Tensor], prefix: str) -> layer.DenseWeights:
    norms = (weights[f"{prefix}.{name}_layernorm.weight"] for name in ("input", "post_attention", "residual"))
    attention = layer.AttentionWeights(*(weights[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkvo"))
    gate = weights[f"{prefix}.block_sparse_moe.gate.weight"]
    return layer.DenseWeights(*norms, attention, mlp_of(weights, f"{prefix}.residual_mlp"), gate)


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
