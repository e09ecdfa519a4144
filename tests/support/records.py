"""Records as commands leave them in ``report/``, made up, of any size; and a checkpoint directory that holds nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from arctic_trt.checkpoint.contract import QuantFormat, plan_config
from arctic_trt.model.config import ArcticConfig
from arctic_trt.model.mapping import plan_mapping
from arctic_trt.report.arctic import RELEASED

SITES = (
    "attention.qkv",
    "attention.dense",
    "mlp.fc",
    "mlp.proj",
    "residual_mlp.fc",
    "residual_mlp.gate",
    "residual_mlp.proj",
)
Raw = dict[str, Any]


def small_config(layers: int = 2, experts: int = 8) -> ArcticConfig:
    return RELEASED.model_copy(
        update={
            "num_hidden_layers": layers,
            "num_local_experts": experts,
            "hidden_size": 128,
            "num_attention_heads": 16,
            "intermediate_size": 96,
            "vocab_size": 512,
        }
    )


def quantize_record(config: ArcticConfig, seed: int = 0) -> Raw:
    """Uneven routing with an expert that no token reached and a few that hardly any did; scales that grow with depth."""
    draw = np.random.default_rng(seed)
    layers, experts, tokens = config.num_hidden_layers, config.num_local_experts, 56692
    shares = draw.lognormal(0, 0.6, (layers, experts))
    counts = np.rint(2 * tokens * shares / shares.sum(1, keepdims=True)).astype(int)
    counts[draw.random((layers, experts)) < 0.004] //= 40
    counts[layers // 2, experts // 3] = 0
    depth = np.linspace(0, 1, layers)
    gains = dict(zip(SITES, (0.012, 0.006, 0.02, 0.08, 0.015, 0.015, 0.05), strict=True))
    scales: list[dict[str, float]] = []
    for layer in range(layers):
        row = {}
        for site in SITES:
            noise = float(np.exp(draw.normal(0, 0.15)))
            row[f"{site}.activation_scaling_factor"] = float(np.float32(gains[site] * (1 + 3 * depth[layer]) * noise))
        row["residual_mlp.gate.activation_scaling_factor"] = row["residual_mlp.fc.activation_scaling_factor"]
        row["attention.qkv.weights_scaling_factor"] = 0.0017
        row["attention.kv_cache_scaling_factor"] = 1.0
        scales.append(row)
    return {
        "output_dir": "arctic-fp8-tp8",
        "tensors": 8 * (3 + 26 * layers),
        "bytes_read": 957_000_000_000,
        "bytes_written": 480_120_000_000,
        "seconds": 11384.513,
        "peak_rss_bytes": 5_432_000_000,
        "resumed_layers": 0,
        "experts_without_tokens": [[int(layer), int(expert)] for layer, expert in np.argwhere(counts == 0)],
        "processes": 1,
        "calibration_samples": 128,
        "calibration_tokens": tokens,
        "hidden_states_on_disk": False,
        "kv_heads_folded_from": None,
        "tokens_per_expert": counts.tolist(),
        "scales": scales,
        "recipe": {
            "model_dir": "/data/snowflake-arctic-instruct",
            "output_dir": "arctic-fp8-tp8",
            "dtype": "bfloat16",
            "qformat": "fp8",
            "kv_cache_dtype": "fp8",
            "calib_dataset": None,
            "calib_size": 128,
            "calib_max_seq_length": 512,
            "batch_size": 1,
            "seed": 1234,
            "calibrator": "streaming",
            "tp_size": 8,
            "pp_size": 1,
        },
        "fingerprint": {
            "version": "0.1.0",
            "checkpoint_headers": "4f1c" * 16,
            "config": "9be0" * 16,
            "calibration_ids": "a7d2" * 16,
        },
        "version": "0.1.0",
        "unknown": {"of": "the future"},
    }


def verify_record(config: ArcticConfig, *, findings: int = 0, seed: int = 0) -> Raw:
    """A verification against the original, with ``findings`` findings, every other one an error."""
    draw = np.random.default_rng(seed)
    base = dict(zip(SITES, (31.4, 31.2, 31.3, 31.0, 31.5, 31.5, 30.2), strict=True))
    sqnr = []
    for layer in range(config.num_hidden_layers):
        for site in SITES:
            mean = base[site] + float(draw.normal(0, 0.2))
            spread = abs(float(draw.normal(0, 1.6))) * (2 if site.startswith("mlp.") else 0.5)
            count = config.num_local_experts if site.startswith("mlp.") else 1
            sqnr.append({"layer": layer, "site": site, "min_db": mean - spread, "mean_db": mean, "count": count})
    found = [
        {
            "severity": "warning" if i % 2 else "error",
            "kind": "outlier" if i % 2 else "missing",
            "file": f"rank{i % 8}.safetensors",
            "tensor": f"transformer.layers.{i}.attention.kv_cache_scaling_factor",
            "sentence": f"rank{i % 8}.safetensors lacks tensor transformer.layers.{i}.attention.kv_cache_scaling_factor.",
        }
        for i in range(findings)
    ]
    errors = len([finding for finding in found if finding["severity"] == "error"])
    return {
        "passed": errors == 0,
        "errors": errors,
        "warnings": findings - errors,
        "findings": sorted(found, key=lambda finding: finding["severity"]),
        "worst": [{"tensor": f"transformer.layers.{i}.mlp.proj.weight[7]", "sqnr_db": 24.0 + i / 4} for i in range(10)],
        "sqnr": sqnr,
        "tensors": 8 * (3 + 26 * config.num_hidden_layers),
        "bytes_read": 1_437_000_000_000,
        "against": "/data/snowflake-arctic-instruct",
        "share": 1.0,
        "path": "arctic-fp8-tp8",
        "seconds": 6123.8,
    }


def eval_record(config: ArcticConfig, *, sensitivity: bool = True, seed: int = 0) -> Raw:
    """An evaluation against the original whose errors grow with depth."""
    draw = np.random.default_rng(seed)
    layers = config.num_hidden_layers
    errors = np.cumsum(np.abs(draw.normal(0.0012, 0.0004, layers))) + 0.012
    return {
        "path": "arctic-fp8-tp8",
        "against": "/data/snowflake-arctic-instruct",
        "data": {
            "path": "calib/heldout.jsonl",
            "samples": 64,
            "tokens": 30412,
            "predicted_tokens": 30348,
            "digest": "c0de" * 16,
        },
        "perplexity": 6.4137,
        "nll": 1.85843,
        "reference": {"perplexity": 6.3871, "nll": 1.85427},
        "kl_mean": 0.01172,
        "kl_p99": 0.1493,
        "kl_max": 1.733,
        "top1_agreement": 0.9713,
        "hidden_error": errors.tolist(),
        "seconds": 20113.2,
        "peak_rss_bytes": 7_211_000_000,
        "bytes_read": 1_437_000_000_000,
        "resumed_layers": 0,
        "version": "0.1.0",
        "sensitivity": sensitivity_record(layers, draw) if sensitivity else None,
    }


def sensitivity_record(layers: int, draw: np.random.Generator) -> Raw:
    kinds = ("attention", "residual_mlp", "experts", "kv_cache")
    units = []
    for layer in range(layers):
        for kind in kinds[:3]:
            kl = float(draw.lognormal(-9, 1.1))
            size = {"attention": 117_000_000, "residual_mlp": 154_000_000, "experts": 13_390_000_000}[kind]
            units.append({"layer": layer, "site": kind, "error": 30 * kl, "kl": kl, "bytes": size, "kept": False})
    units.append({"layer": None, "site": "kv_cache", "error": 0.004, "kl": 0.00007, "bytes": 0, "kept": False})
    units.sort(key=lambda unit: -unit["kl"])
    for unit in units[:6]:
        unit["kept"] = unit["site"] != "experts"
    return {
        "sites": [{"site": kind, "kl_mean": kl} for kind, kl in zip(kinds, (0.00213, 0.00321, 0.00604, 0.00007), strict=True)],
        "units": units,
        "budget_bytes": 48_000_000_000,
        "spent_bytes": sum(unit["bytes"] for unit in units if unit["kept"]),
        "predicted_kl": 0.0093,
        "recipe": "calib/mixed.yaml",
    }


def write_records(
    directory: Path,
    config: ArcticConfig | None = None,
    *,
    quantize: Raw | None = None,
    verify: Raw | None = None,
    evaluate: Raw | None = None,
    tp_size: int = 8,
) -> Path:
    """A checkpoint directory with these records, and ``config.json`` where there is a ``config``; it has no weights."""
    (directory / "report").mkdir(parents=True)
    if config:
        raw = plan_config(config, plan_mapping(config, tp_size=tp_size), QuantFormat(fp8=True, kv_fp8=True))
        (directory / "config.json").write_text(json.dumps(raw))
    for name, record in (("quantize", quantize), ("verify", verify), ("eval", evaluate)):
        if record is not None:
            (directory / "report" / f"{name}.json").write_text(json.dumps(record))
    return directory
