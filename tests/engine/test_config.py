"""``config.json`` of engines, ours, TensorRT-LLM's and what is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_trt import __version__
from arctic_trt.checkpoint.contract import QuantFormat, plan_config
from arctic_trt.engine.config import (
    BuildConfig,
    EngineConfig,
    is_engine_config,
    plan_build_config,
    plan_engine_config,
    read_engine_config,
)
from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.mapping import plan_mapping
from tests.support.checkpoints import TINY

QUANT = QuantFormat(fp8=True, kv_fp8=True)
TRTLLM_BUILD_CONFIG = {
    "max_input_len": 1024,
    "max_seq_len": 4096,
    "max_batch_size": 2048,
    "max_beam_width": 1,
    "max_num_tokens": 8192,
    "opt_num_tokens": 2048,
    "kv_cache_type": "PAGED",
    "plugin_config": {"gpt_attention_plugin": "bfloat16", "gemm_plugin": "bfloat16"},
    "lora_config": {},
}


@pytest.fixture(scope="module")
def arctic() -> ArcticConfig:
    return parse_config(TINY)


def pretrained(arctic: ArcticConfig, **sizes: int) -> dict[str, Any]:
    return plan_config(arctic, plan_mapping(arctic, **sizes), QUANT)


def write(directory: Path, value: object) -> Path:
    (directory / "config.json").write_text(json.dumps(value))
    return directory


def test_limits_follow_the_model(arctic: ArcticConfig) -> None:
    assert plan_build_config(arctic) == BuildConfig(
        max_batch_size=256, max_input_len=4096, max_seq_len=4096, max_num_tokens=8192, max_beam_width=1
    )
    limits = plan_build_config(arctic, max_seq_len=100, max_batch_size=3, max_num_tokens=5)
    assert (limits.max_input_len, limits.max_seq_len, limits.max_batch_size, limits.max_num_tokens) == (100, 100, 3, 5)
    assert plan_build_config(arctic, max_input_len=7).max_input_len == 7


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"max_seq_len": 4097}, "--max_seq_len 4097 exceeds max_position_embeddings=4096"),
        ({"max_seq_len": 10, "max_input_len": 11}, "--max_input_len 11 exceeds --max_seq_len 10"),
        ({"max_batch_size": 0}, "--max_batch_size 0 is not a positive number"),
        ({"max_num_tokens": -1}, "--max_num_tokens -1 is not a positive number"),
        ({"max_beam_width": 2}, "--max_beam_width 2 is not supported"),
    ],
)
def test_limits_that_do_not_fit(arctic: ArcticConfig, limits: dict[str, int], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        plan_build_config(arctic, **limits)


def test_what_is_written_is_read_back(arctic: ArcticConfig, tmp_path: Path) -> None:
    raw, limits = pretrained(arctic, tp_size=4, pp_size=2, moe_ep_size=2), plan_build_config(arctic)
    written = plan_engine_config("torch", raw, limits)
    assert list(written) == ["version", "backend", "pretrained_config", "build_config"]
    engine = read_engine_config(write(tmp_path, written))
    assert engine == EngineConfig(version=__version__, backend="torch", pretrained_config=raw, build_config=limits)
    config, mapping, quant = engine.network()
    assert (mapping, quant) == (plan_mapping(arctic, tp_size=4, pp_size=2, moe_ep_size=2), QUANT)
    assert config.hidden_size == 128


def test_an_engine_of_tensorrt_llm_is_recognised(arctic: ArcticConfig, tmp_path: Path) -> None:
    raw = {"version": "1.2.1", "pretrained_config": pretrained(arctic, tp_size=8), "build_config": TRTLLM_BUILD_CONFIG}
    engine = read_engine_config(write(tmp_path, raw))
    assert (engine.backend, engine.version, engine.network()[1].world_size) == ("tensorrt_llm", "1.2.1", 8)
    assert engine.build_config.max_batch_size == 2048


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({"architecture": "ArcticForCausalLM", "mapping": {}}, "describes a TensorRT-LLM checkpoint, not an engine"),
        ({"architectures": ["ArcticForCausalLM"]}, "describes a Hugging Face model, not an engine"),
        ({}, "describes something else, not an engine"),
        ([], "holds a list"),
        (
            {"backend": "vulkan", "pretrained_config": {}, "build_config": {}},
            "backend='vulkan', expected one of torch, tensorrt_llm",
        ),
        ({"backend": "torch", "pretrained_config": {}, "build_config": {}}, "build_config.max_batch_size=None"),
    ],
)
def test_what_is_no_engine(raw: object, complaint: str, tmp_path: Path) -> None:
    assert not (isinstance(raw, dict) and is_engine_config(raw)) or "backend" in raw
    with pytest.raises(UsageError) as caught:
        read_engine_config(write(tmp_path, raw))
    assert complaint in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json does not exist. Point --engine_dir"):
        read_engine_config(tmp_path / "absent")
