"""Checkpoints whose files have every byte of their size but nothing in them, except what is looked at: headers and KV heads."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.layout import TensorSpec, plan_layout
from arctic_trt.model.config import parse_config
from arctic_trt.model.names import hf_shapes

ARCTIC_DIR = Path(__file__).parents[1] / "data" / "arctic-config"
ARCTIC: dict[str, Any] = json.loads((ARCTIC_DIR / "config.json").read_text(encoding="utf-8"))
BASE = {**ARCTIC, "num_key_value_heads": 56, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **ARCTIC,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "vocab_size": 100,
}
SMALL_BYTES = 2 * (2 * 100 * 64 + 64 + 3 * (3 * 64 + 5 * 64 * 64 + 2 * 32 * 64 + 4 * 64 + 4 * 3 * 48 * 64))


def hollow_checkpoint(directory: Path, raw: dict[str, Any] = SMALL, *, kv_repeats: int = 1, shards: int = 2) -> list[Path]:
    """Write config.json, index and shards; every KV head is stored ``kv_repeats`` times in a row. Returns the shards."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    specs = [TensorSpec(name, "BF16", shape) for name, shape in hf_shapes(config).items()]
    weight_map = {}
    for number in range(shards):
        part = plan_layout(specs[number::shards])
        path = directory / f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with path.open("wb") as file:
            file.write(part.header)
            file.truncate(part.total_bytes)
            for name, spec in part.specs.items():
                weight_map[name] = path.name
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    file.seek(part.offsets[name])
                    file.write(_kv_heads(spec.num_bytes, config.num_key_value_heads, kv_repeats))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(directory.glob("*.safetensors"))


def _kv_heads(num_bytes: int, heads: int, repeats: int) -> bytes:
    """Bf16 numbers, none of them NaN, in ``heads`` equal parts of which each group of ``repeats`` is the same."""
    distinct = [bytes(random.Random(head).choices(range(64), k=num_bytes // heads)) for head in range(heads // repeats)]
    return b"".join(head * repeats for head in distinct)
