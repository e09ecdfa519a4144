"""Arctic checkpoints made on the spot, tensor by tensor: random ones of any size, and small trained ones made wider."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

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


def make_checkpoint(directory: Path, *, seed: int = 0, **changes: object) -> ArcticConfig:
    """A random bf16 checkpoint, written tensor by tensor; kept if one of this configuration is there already."""
    raw = {**BASE, **changes}
    config = parse_config(raw)
    if (directory / "config.json").exists() and json.loads((directory / "config.json").read_text()) == raw:
        return config
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed))
    order = {name: index for index, name in enumerate(hf_shapes(config))}
    write_checkpoint(directory, raw, lambda name, shape: random_weight(noise, shape, order[name]))
    return config


def write_checkpoint(
    directory: Path, raw: dict[str, object], weight: Callable[[str, tuple[int, ...]], torch.Tensor]
) -> ArcticConfig:
    """model.safetensors with one tensor in memory at a time, and then config.json, so that an interrupted one has none."""
    config = parse_config(raw)
    shapes = hf_shapes(config)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]
    file = TensorFileWriter(directory / "model.safetensors", plan_layout(specs, {"format": "pt"}))
    for name, shape in shapes.items():
        file.write(name, weight(name, shape))
    file.finish()
    (directory / "config.json").write_text(json.dumps(raw))
    return config


def widen_checkpoint(source: Path, directory: Path, factor: int) -> ArcticConfig:
    """The same function as ``source`` computes, in heads, layers and experts ``factor`` (4 or 16) times as wide.

    TensorRT-LLM has no kernels for very small sizes: heads have 32 numbers at least, a rank's part of an expert a multiple of 16
    in FP8. So every number is followed by ``factor - 1`` zeros. What depends on a length is corrected by powers of two,
    exactly in bf16: the norms (a mean over more numbers) and q (whose products are divided by the root of the head size). The
    spacing keeps every rotary frequency: number i of a head of n turns as number factor * i of a head of factor * n.
    """
    raw = json.loads((source / "config.json").read_text())
    raw["hidden_size"] *= factor
    raw["intermediate_size"] *= factor
    raw["rms_norm_eps"] /= factor
    directory.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.name != "config.json" and ".safetensors" not in path.name:
            shutil.copy(path, directory)
    files = {}
    for path in sorted(source.glob("*.safetensors")):
        file = safe_open(path, "pt")
        files |= dict.fromkeys(file.keys(), file)
    return write_checkpoint(directory, raw, lambda name, _: widen_weight(name, files[name].get_tensor(name), factor))


def widen_weight(name: str, weight: torch.Tensor, factor: int) -> torch.Tensor:
    """Zeros between the numbers of every dimension but those that count tokens of the vocabulary or experts."""
    root = {4: 2, 16: 4}[factor]
    if weight.dim() == 1:
        weight = weight / root
    elif name.endswith("q_proj.weight"):
        weight = weight * root
    counts = name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight"))
    steps = [1 if counts and dim == 0 else factor for dim in range(weight.dim())]
    wide = weight.new_zeros([length * step for length, step in zip(weight.shape, steps, strict=True)])
    wide[tuple(slice(None, None, step) for step in steps)] = weight
    return wide


def random_weight(noise: torch.Tensor, shape: tuple[int, ...], index: int) -> torch.Tensor:
    """Weights from one block of noise, shifted and scaled by ``index``: quick to make, different everywhere."""
    count = torch.Size(shape).numel()
    values = noise.roll(index * 7919).repeat(-(-count // len(noise)))[:count].view(shape)
    gain = 0.5 + (index * 0.37) % 1.5
    return (1 + 0.1 * values).bfloat16() if len(shape) == 1 else (values * gain * shape[-1] ** -0.5).bfloat16()


def make_samples(path: Path, vocab_size: int, samples: int, tokens: int, *, seed: int = 5) -> Path:
    ids = torch.randint(0, vocab_size, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))
    return path
