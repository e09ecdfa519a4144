"""Arctic's Hugging Face ``config.json``, read strictly.

The Python defaults in circulation (hidden 4096, 8 experts, top-1, rope_theta 1e6, an MoE in every other layer) describe no
released Arctic, so nothing that shapes the computation is ever defaulted: a missing key is an error that names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arctic_trt.errors import UsageError

ARCHITECTURE = "ArcticForCausalLM"


class ArcticConfig(BaseModel):
    """The keys of ``config.json`` that decide what the network computes; sizes are counts of elements."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_local_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_layer_frequency: int = Field(gt=0)
    parallel_attn_mlp_res: bool
    use_residual: bool
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    hidden_act: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Rows of ``k_proj`` and ``v_proj``."""
        return self.num_key_value_heads * self.head_dim

    def with_kv_heads(self, count: int) -> ArcticConfig:
        return self.model_copy(update={"num_key_value_heads": count})


def parse_config(raw: dict[str, Any], source: str = "config.json") -> ArcticConfig:
    """Check a decoded ``config.json`` and return the Arctic it describes.

    Raises :class:`UsageError` for another architecture, a missing or mistyped key, contradictory residual switches, and
    for variants that no released Arctic has and TensorRT-LLM's network could not run.
    """
    _check_architecture(raw, source)
    try:
        config = ArcticConfig(**{key: raw[key] for key in ArcticConfig.model_fields if key in raw})
    except ValidationError as error:
        raise UsageError(_first_problem(error, source), "Restore the file from the original checkpoint.") from None
    _check_semantics(config, raw, source)
    return config


def read_config(model_dir: Path) -> ArcticConfig:
    """Read ``model_dir/config.json``; raises :class:`UsageError` if it is absent or not JSON."""
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist.", "Point --model_dir at the directory of a Hugging Face Arctic checkpoint."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", "Download it again.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds a {type(raw).__name__}, expected a JSON object.", "Download it again.")
    return parse_config(raw, str(path))


def _check_architecture(raw: dict[str, Any], source: str) -> None:
    found = raw.get("architectures")
    if found is None:
        raise UsageError(f"{source} lacks the key 'architectures'.", f'Expected ["{ARCHITECTURE}"].')
    if found != [ARCHITECTURE]:
        raise UsageError(
            f"{source} describes {found}, expected ['{ARCHITECTURE}'].", "Only Snowflake Arctic checkpoints are supported."
        )


def _first_problem(error: ValidationError, source: str) -> str:
    missing = [str(item["loc"][0]) for item in error.errors() if item["type"] == "missing"]
    if missing:
        keys = ", ".join(f"'{key}'" for key in missing)
        return f"{source} lacks the key{'s' if len(missing) > 1 else ''} {keys}, and no default of it is right for Arctic."
    item = error.errors()[0]
    return f"{source} has {item['loc'][0]}={item['input']!r}: {item['msg'].lower()}."


def _check_semantics(config: ArcticConfig, raw: dict[str, Any], source: str) -> None:
    if config.use_residual != config.parallel_attn_mlp_res:
        raise UsageError(
            f"{source} has use_residual={config.use_residual} but parallel_attn_mlp_res={config.parallel_attn_mlp_res}: "
            "the two must agree, because implementations read one or the other."
        )
    expected = {
        "parallel_attn_mlp_res": (config.parallel_attn_mlp_res, True),
        "moe_layer_frequency": (config.moe_layer_frequency, 1),
        "hidden_act": (config.hidden_act, "silu"),
        "tie_word_embeddings": (raw.get("tie_word_embeddings", False), False),
        "sliding_window": (raw.get("sliding_window"), None),
        "rope_scaling": (raw.get("rope_scaling"), None),
        "quantization": (raw.get("quantization"), None),
        "head_dim": (raw.get("head_dim", config.head_dim), config.head_dim),
    }
    for key, (found, supported) in expected.items():
        if found != supported:
            raise UsageError(
                f"{source} has {key}={found!r}, expected {supported!r}.", "TensorRT-LLM's Arctic network has no other variant."
            )
    for whole, part in (
        ("hidden_size", "num_attention_heads"),
        ("num_attention_heads", "num_key_value_heads"),
    ):
        if getattr(config, whole) % getattr(config, part):
            raise UsageError(
                f"{source} has {whole}={getattr(config, whole)}, which {part}={getattr(config, part)} does not divide."
            )
    if config.head_dim % 2:
        raise UsageError(f"{source} gives a head size of {config.head_dim}, which rotary embedding needs to be even.")
    if config.num_experts_per_tok > config.num_local_experts:
        raise UsageError(
            f"{source} has num_experts_per_tok={config.num_experts_per_tok} of num_local_experts={config.num_local_experts}."
        )
