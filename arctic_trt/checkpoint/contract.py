"""The TensorRT-LLM checkpoint as a contract: what every rank file contains, and ``config.json``.

This format is the only thing that the quantizer and the engines share. Names, shapes and dtypes are those of TensorRT-LLM
1.0 to 1.2 (its loader refuses a missing or misshapen tensor); ``config.json`` holds only keys that all of these accept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arctic_trt.checkpoint.exclusion import is_excluded, plan_exclusion, select, split_twins
from arctic_trt.checkpoint.layout import FileLayout, TensorSpec, plan_layout
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ARCHITECTURE, ArcticConfig
from arctic_trt.model.mapping import Mapping, Rank, padded_vocab, plan_mapping
from arctic_trt.model.names import (
    EMBEDDING,
    FINAL_NORM,
    KV_CACHE_SCALE,
    LAYER,
    LM_HEAD,
    Cut,
    Kind,
    Row,
    activation_scale,
    trt_layer,
    weight_scale,
)

DTYPES = {Kind.BFLOAT16: "BF16", Kind.FLOAT32: "F32", Kind.QUANTIZED: "F8_E4M3"}
EXCLUDED_FROM_QUANTIZATION = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)
NO_NORMALIZATION, RENORMALIZE = 0, 1


@dataclass(frozen=True, slots=True)
class QuantFormat:
    """What is stored in e4m3: the linear layers (``fp8``), and, at run time, the KV cache (``kv_fp8``).

    ``exclude_modules`` are the patterns, beside TensorRT-LLM's defaults, of modules that stay in bf16 nevertheless
    (:mod:`arctic_trt.checkpoint.exclusion`); the cache's scale is there for their layers too.
    """

    fp8: bool
    kv_fp8: bool
    exclude_modules: tuple[str, ...] = ()

    def is_fp8(self, local_layer: int, row: Row) -> bool:
        """Whether ``row`` of a layer, which counts from 0 in its pipeline stage, is stored in e4m3 with scales."""
        return self.fp8 and row.kind is Kind.QUANTIZED and not is_excluded(self.exclude_modules, local_layer, row.module)

    def fp8_names(self, local_layer: int) -> frozenset[str]:
        """The rows for which :meth:`is_fp8` holds, by their names without ``.weight``."""
        return frozenset(row.trt.removesuffix(".weight") for row in LAYER if self.is_fp8(local_layer, row))

    def modules_in_bf16(self, num_layers: int) -> list[tuple[int, str]]:
        """(layer, module) of what is excluded among so many layers that count from 0; without FP8 nothing is."""
        return sorted(select(self.exclude_modules, num_layers)) if self.fp8 else []


def plan_format(
    *, fp8: bool, kv_fp8: bool, exclude_modules: Sequence[str], config: ArcticConfig, mapping: Mapping
) -> QuantFormat:
    """What a recipe asks for; raises :class:`UsageError` for patterns that this model, cut this way, cannot follow."""
    return QuantFormat(fp8, kv_fp8, plan_exclusion(exclude_modules, config.num_hidden_layers, mapping))


def rank_file(rank: int) -> str:
    """File name of one rank, as TensorRT-LLM looks for it."""
    return f"rank{rank}.safetensors"


def local_shape(row: Row, rank: Rank, config: ArcticConfig) -> tuple[int, ...]:
    """Shape of one rank's part of ``row``."""
    hidden, tp_size = config.hidden_size, rank.mapping.tp_size
    expert_rows = config.intermediate_size // rank.mapping.moe_tp_size
    experts = len(rank.experts(config.num_local_experts))
    if row.cut is Cut.REPLICATED:
        return (config.num_local_experts, hidden) if row.kind is Kind.FLOAT32 else (hidden,)
    return {
        Cut.ROWS: (hidden // tp_size, hidden),
        Cut.COLUMNS: (hidden, hidden // tp_size),
        Cut.QKV: (hidden // tp_size + 2 * len(rank.kv_heads(config.num_key_value_heads)) * config.head_dim, hidden),
        Cut.VOCAB: (padded_vocab(config.vocab_size, tp_size) // tp_size, hidden),
        Cut.EXPERT_FC: (experts, 2 * expert_rows, hidden),
        Cut.EXPERT_PROJ: (experts, hidden, expert_rows),
    }[row.cut]


def plan_rank(config: ArcticConfig, rank: Rank, quant: QuantFormat) -> list[TensorSpec]:
    """Every tensor of one rank file, in file order. Layers count from 0 in each pipeline stage."""
    specs = [_spec(EMBEDDING, EMBEDDING.trt, rank, config)] if rank.is_first_stage else []
    for local_layer in range(len(rank.layers(config.num_hidden_layers))):
        for row in LAYER:
            specs += _row_specs(row, local_layer, rank, config, quant)
        if quant.kv_fp8:
            specs.append(TensorSpec(trt_layer(local_layer, KV_CACHE_SCALE), "F32", (1,)))
    if rank.is_last_stage:
        specs += [_spec(row, row.trt, rank, config) for row in (FINAL_NORM, LM_HEAD)]
    return specs


def plan_files(config: ArcticConfig, mapping: Mapping, quant: QuantFormat) -> list[FileLayout]:
    """The layout of every rank's file, in rank order."""
    return [plan_layout(plan_rank(config, rank, quant), {"format": "pt"}) for rank in mapping.ranks()]


def _spec(row: Row, name: str, rank: Rank, config: ArcticConfig, *, fp8: bool = False) -> TensorSpec:
    kind = Kind.BFLOAT16 if row.kind is Kind.QUANTIZED and not fp8 else row.kind
    return TensorSpec(name, DTYPES[kind], local_shape(row, rank, config))


def _row_specs(row: Row, local_layer: int, rank: Rank, config: ArcticConfig, quant: QuantFormat) -> Iterator[TensorSpec]:
    name, fp8 = trt_layer(local_layer, row.trt), quant.is_fp8(local_layer, row)
    spec = _spec(row, name, rank, config, fp8=fp8)
    yield spec
    if fp8:
        per_expert = row.cut in (Cut.EXPERT_FC, Cut.EXPERT_PROJ)
        yield TensorSpec(activation_scale(name), "F32", (1,))
        yield TensorSpec(weight_scale(name), "F32", (spec.shape[0], 1) if per_expert else (1,))


def plan_config(config: ArcticConfig, mapping: Mapping, quant: QuantFormat) -> dict[str, Any]:
    """``config.json``. TensorRT-LLM builds ``moe``, ``mapping`` and ``quantization`` from exactly these keys."""
    return {
        "architecture": ARCHITECTURE,
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "swiglu",
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope_theta,
        "rotary_scaling": None,
        "attn_bias": False,
        "mlp_bias": False,
        "residual_mlp": True,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "moe": {
            "num_experts": config.num_local_experts,
            "top_k": config.num_experts_per_tok,
            "normalization_mode": RENORMALIZE if config.num_experts_per_tok > 1 else NO_NORMALIZATION,
        },
        "mapping": mapping.as_dict(),
        "quantization": {
            "quant_algo": "FP8" if quant.fp8 else None,
            "kv_cache_quant_algo": "FP8" if quant.kv_fp8 else None,
            "exclude_modules": [*EXCLUDED_FROM_QUANTIZATION, *quant.exclude_modules] if quant.fp8 else None,
        },
    }


def parse_pretrained_config(raw: dict[str, Any], source: str) -> tuple[ArcticConfig, Mapping, QuantFormat]:
    """Inverse of :func:`plan_config`; raises :class:`UsageError` for a checkpoint of another architecture or layout."""
    try:
        if raw["architecture"] != ARCHITECTURE or raw["residual_mlp"] is not True:
            raise UsageError(
                f"{source} describes architecture {raw['architecture']!r}, expected {ARCHITECTURE} with residual_mlp."
            )
        config = ArcticConfig(
            hidden_size=raw["hidden_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"],
            intermediate_size=raw["intermediate_size"],
            num_local_experts=raw["moe"]["num_experts"],
            num_experts_per_tok=raw["moe"]["top_k"],
            moe_layer_frequency=1,
            parallel_attn_mlp_res=True,
            use_residual=True,
            vocab_size=raw["vocab_size"],
            max_position_embeddings=raw["max_position_embeddings"],
            rope_theta=raw["rotary_base"],
            rms_norm_eps=raw["norm_epsilon"],
            hidden_act="silu",
        )
        sizes = {key: raw["mapping"][key] for key in ("tp_size", "pp_size", "moe_tp_size", "moe_ep_size")}
        algos = raw["quantization"]["quant_algo"], raw["quantization"]["kv_cache_quant_algo"]
        listed = raw["quantization"].get("exclude_modules")
    except KeyError as error:
        raise UsageError(f"{source} lacks the key {error}.", "Quantize the checkpoint again.") from None
    except ValueError as error:
        raise UsageError(f"{source} is not an Arctic checkpoint's: {error}") from None
    if not set(algos) <= {"FP8", None}:
        raise UsageError(f"{source} asks for quantization {algos}, expected FP8 or none.")
    try:
        mapping = plan_mapping(config, **sizes)
    except UsageError as error:
        raise UsageError(f"{source} has a mapping that does not fit: {error.message}", "Quantize the checkpoint again.") from None
    excluded = _parse_exclusion(listed, len(mapping.layers(0, config.num_hidden_layers)), source) if algos[0] else ()
    return config, mapping, QuantFormat(algos[0] == "FP8", algos[1] == "FP8", excluded)


def _parse_exclusion(listed: object, layers: int, source: str) -> tuple[str, ...]:
    """Of a list in ``config.json``, what concerns modules that could be quantized; None stands for the defaults.

    Producers name what is never quantized in ways of their own, such as each router by its name: that is left out here.
    """
    patterns = [] if listed is None else listed
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UsageError(f"{source} has exclude_modules={listed!r}, expected null or a list of patterns.")
    layer = split_twins(select(patterns, layers))
    if layer is not None:
        raise UsageError(
            f"{source} excludes one of residual_mlp.fc and residual_mlp.gate of layer {layer} without the other, but they read "
            "the same input in one product.",
            "Quantize the checkpoint again.",
        )
    return tuple(pattern for pattern in patterns if select([pattern], layers))


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object from disk; raises :class:`UsageError` with ``hint`` when it is not there or not one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", hint) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.", hint) from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds a {type(raw).__name__}, expected a JSON object.", hint)
    return raw


def parse_object(line: str, where: str, forms: str) -> dict[str, Any]:
    """One line of a jsonl file; raises :class:`UsageError` that names the line and the ``forms`` it may have."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}.", f"Expected {forms}.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where} holds a {type(value).__name__}, expected {forms}.")
    return value
