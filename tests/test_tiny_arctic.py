"""The committed tiny Arctic has the layout of a released one, and the calibration text is fit for use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from arctic_trt.model.config import parse_config

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests" / "data" / "tiny-arctic"
CALIB = ROOT / "calib"
HIDDEN, FFN, KV, EXPERTS, LAYERS, VOCAB = 128, 96, 64, 8, 2, 512
RELEASED_KEYS = {
    "architectures", "attention_dropout", "bos_token_id", "enable_expert_tensor_parallelism", "eos_token_id", "hidden_act",
    "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "max_sequence_length", "model_type",
    "moe_eval_capacity_factor", "moe_layer_frequency", "moe_min_capacity", "moe_token_dropping", "moe_train_capacity_factor",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "parallel_attn_mlp_res", "quantization", "rms_norm_eps", "rope_theta", "router_aux_loss_coef", "sliding_window",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "use_residual", "vocab_size",
}  # fmt: skip


def read_json(name: str) -> Any:
    return json.loads((MODEL / name).read_text(encoding="utf-8"))


def read_samples(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (CALIB / name).read_text(encoding="utf-8").splitlines()]


def texts_of(sample: dict[str, Any]) -> list[str]:
    return [sample["text"]] if "text" in sample else [message["content"] for message in sample["messages"]]


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, HIDDEN))
    shapes["model.norm.weight"] = (HIDDEN,)
    for index in range(LAYERS):
        prefix = f"model.layers.{index}"
        for norm in ("input", "residual", "post_attention"):
            shapes[f"{prefix}.{norm}_layernorm.weight"] = (HIDDEN,)
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        for number in (1, 2, 3):
            shapes[f"{prefix}.residual_mlp.w{number}.weight"] = (HIDDEN, HIDDEN)
            for expert in range(EXPERTS):
                name = f"{prefix}.block_sparse_moe.experts.{expert}.w{number}.weight"
                shapes[name] = (HIDDEN, FFN) if number == 2 else (FFN, HIDDEN)
        shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
    return shapes


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(MODEL, local_files_only=True)


def test_directory_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*")) <= 4_000_000


def test_config_has_every_key_of_the_released_one() -> None:
    raw = read_json("config.json")
    assert set(raw) == RELEASED_KEYS
    config = parse_config(raw)
    assert (config.hidden_size, config.intermediate_size, config.kv_size) == (HIDDEN, FFN, KV)
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (LAYERS, EXPERTS, 2)
    assert (raw["bos_token_id"], raw["eos_token_id"], raw["vocab_size"]) == (510, 511, VOCAB)
    assert read_json("generation_config.json")["eos_token_id"] == 511


def test_every_tensor_is_there_once_in_bf16() -> None:
    found: dict[str, tuple[int, ...]] = {}
    index = read_json("model.safetensors.index.json")
    shards = sorted(MODEL.glob("*.safetensors"))
    for number, path in enumerate(shards, 1):
        assert path.name == f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with safe_open(path, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                assert name not in found
                assert index["weight_map"][name] == path.name
                assert tensor.dtype == torch.bfloat16
                assert bool(tensor.isfinite().all())
                found[name] = tuple(tensor.shape)
    assert found == expected_shapes()
    assert len(shards) in (2, 3)
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(2 * torch.Size(shape).numel() for shape in found.values())


def test_token_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    vocab = read_json("tokenizer.json")["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(VOCAB))
    assert len(tokenizer) == VOCAB
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)]) == list(range(3, 259))
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [510, 511]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    assert tokenizer.encode("The future of AI is")[0] == 1


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "two  spaces, a\ttab", "Zürich 雪 ❄", " leading and trailing "])
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_calibration_text_round_trips(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for name in ("default.jsonl", "heldout.jsonl") for sample in read_samples(name) for text in texts_of(sample)]
    batch = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(batch) == texts
    assert max(map(len, batch)) <= tokenizer.model_max_length == 4096


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [index for index in ids if index >= 510] == [510, 511, 510, 511, 510]
    assert 1 not in ids


@pytest.mark.parametrize("name", ["default.jsonl", "heldout.jsonl"])
def test_calibration_lines_are_well_formed(name: str) -> None:
    samples = read_samples(name)
    for sample in samples:
        assert set(sample) in ({"text"}, {"messages"})
        assert 600 <= sum(map(len, texts_of(sample))) <= 1800
        if "messages" in sample:
            roles = [message["role"] for message in sample["messages"] if set(message) == {"role", "content"}]
            assert roles[roles[0] == "system" :] == ["user", "assistant"] * (len(sample["messages"]) // 2)
    assert 0.1 < sum("messages" in sample for sample in samples) / len(samples) < 0.3


def test_heldout_text_is_new() -> None:
    default, heldout = ((CALIB / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("default", "heldout"))
    assert len(default) >= 160
    assert len(heldout) >= 24
    assert len(set(default)) == len(default)
    assert len(set(heldout)) == len(heldout)
    assert not set(default) & set(heldout)
