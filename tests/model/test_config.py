"""Reading config.json strictly: nothing that shapes the computation has a default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arctic_trt.errors import UsageError
from arctic_trt.model.config import ArcticConfig, parse_config, read_config
from tests.support.checkpoints import TINY

RELEASED = {
    **TINY,
    "hidden_size": 7168,
    "num_hidden_layers": 35,
    "num_attention_heads": 56,
    "intermediate_size": 4864,
    "num_local_experts": 128,
    "vocab_size": 32000,
    "moe_eval_capacity_factor": 1,
    "auto_map": {"AutoConfig": "configuration_arctic.ArcticConfig"},
}


def test_the_released_config_is_read_and_unused_keys_are_ignored() -> None:
    config = parse_config(RELEASED)
    assert (config.head_dim, config.kv_size, config.num_experts_per_tok, config.rope_theta) == (128, 1024, 2, 10000.0)


@pytest.mark.parametrize("key", ["architectures", *ArcticConfig.model_fields])
def test_a_missing_key_is_an_error_that_names_it(key: str) -> None:
    raw = {name: value for name, value in RELEASED.items() if name != key}
    with pytest.raises(UsageError, match=rf"model/config\.json lacks the key '{key}'"):
        parse_config(raw, "model/config.json")


def test_several_missing_keys_are_all_named() -> None:
    raw = {name: value for name, value in RELEASED.items() if name not in ("rope_theta", "vocab_size")}
    with pytest.raises(UsageError, match="lacks the keys 'vocab_size', 'rope_theta'"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "describes ['MixtralForCausalLM'], expected ['ArcticForCausalLM']"),
        ({"hidden_size": "7168"}, "hidden_size='7168': input should be a valid integer"),
        ({"hidden_size": 7168.5}, "hidden_size=7168.5"),
        ({"num_local_experts": True}, "num_local_experts=True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: input should be greater than 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None"),
        ({"use_residual": "yes"}, "use_residual='yes'"),
        ({"use_residual": False}, "use_residual=False but parallel_attn_mlp_res=True"),
        ({"parallel_attn_mlp_res": False}, "use_residual=True but parallel_attn_mlp_res=False"),
        ({"use_residual": False, "parallel_attn_mlp_res": False}, "parallel_attn_mlp_res=False, expected True"),
        ({"moe_layer_frequency": 2}, "moe_layer_frequency=2, expected 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', expected 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ({"quantization": {"q_bits": 8}}, "quantization="),
        ({"head_dim": 64}, "head_dim=64, expected 128"),
        ({"num_attention_heads": 60}, "hidden_size=7168, which num_attention_heads=60 does not divide"),
        ({"num_key_value_heads": 9}, "num_attention_heads=56, which num_key_value_heads=9 does not divide"),
        ({"hidden_size": 56}, "head size of 1"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 of num_local_experts=128"),
    ],
)
def test_a_config_that_arctic_cannot_have_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config({**RELEASED, **change}, "config.json")
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("config.json ")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "does not exist"), (b"{", "not valid JSON"), (b"[]", "holds a list"), (b"\xff", "not valid JSON")],
)
def test_an_unreadable_config_json_is_named(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match=complaint) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_read_config_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert read_config(tmp_path) == parse_config(RELEASED)
