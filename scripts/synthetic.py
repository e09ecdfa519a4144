"""Random Arctic checkpoints of any size, written tensor by tensor, and token ids to go with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from arctic_trt.checkpoint.layout import TensorSpec, plan_layout
from arctic_trt.checkpoint.tensors import TensorFileWriter
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.names import hf_shapes

BASE = {
    "architectures": ["ArcticForCausalLM"],
    "model_type": "arctic",
    "hidden_size": 1024,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 704,
    "num_local_experts": 64,
    "num_experts_per_tok": 2,
    "moe_layer_frequency": 1,
    "parallel_attn_mlp_res": True,
    "use_residual": True,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
FULL_WIDTH = {
    "hidden_size": 7168,
    "num_attention_heads": 56,
    "intermediate_size": 4864,
}


def make_checkpoint(directory: Path, **changes: object) -> ArcticConfig:
    """A random bf16 checkpoint, written tensor by tensor; kept if it is there already."""
    raw = {**BASE, **changes}
    config = parse_config(raw)
    if (directory / "config.json").exists() and json.loads((directory / "config.json").read_text()) == raw:
        return config
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    shapes = hf_shapes(config)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    file = TensorFileWriter(directory / "model.safetensors", plan_layout(specs, {"format": "pt"}))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    for index, (name, shape) in enumerate(shapes.items()):
        file.write(name, random_weight(noise, shape, index))
    file.finish()
    (directory / "config.json").write_text(json.dumps(raw))
    return config


def random_weight(noise: torch.Tensor, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Weights from one block of noise, shifted and scaled by ``index``: quick to make, different everywhere."""
    count = torch.Size(shape).numel()
    values = noise.roll(index * 7919).repeat(-(-count // len(noise)))[:count].view(shape)
    gain = 0.5 + (index * 0.37) % 1.5
    return (1 + 0.1 * values).bfloat16() if len(shape) == 1 else (values * gain * shape[-1] ** -0.5).bfloat16()


def make_samples(path: Path, vocab_size: int, samples: int, tokens: int) -> Path:
    ids = torch.randint(0, vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(5))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    return path
