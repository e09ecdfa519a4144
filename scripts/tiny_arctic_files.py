"""The tiny Arctic's tokenizer and configuration files, laid out as a released Arctic's: 512 ids instead of 32,000.

Llama 2's layout: ``<unk>``, ``<s>``, ``</s>``, 256 bytes, then byte-pair pieces; the last two ids are ChatML's markers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

VOCAB = 512
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
HEAD, CHAT = ["<unk>", "<s>", "</s>"], ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["ArcticForCausalLM"],
    "attention_dropout": 0,
    "bos_token_id": VOCAB - 2,
    "enable_expert_tensor_parallelism": False,
    "eos_token_id": VOCAB - 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "max_sequence_length": 4096,
    "model_type": "arctic",
    "moe_eval_capacity_factor": 1,
    "moe_layer_frequency": 1,
    "moe_min_capacity": 0,
    "moe_token_dropping": True,
    "moe_train_capacity_factor": 1,
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "parallel_attn_mlp_res": True,
    "quantization": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_residual": True,
    "vocab_size": VOCAB,
}
ALPHABET = 44


def train_pieces(texts: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte-pair pieces and merges, in order of rank, of words cut as SentencePiece cuts them; newlines stay bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = Regex(r"▁+(?=▁)|▁?[A-Za-z]+|▁?[^A-Za-z▁]|▁")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Split(words, "isolated")])
    room = VOCAB - len(HEAD) - len(BYTES) - len(CHAT)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=room, limit_alphabet=ALPHABET, show_progress=False))
    vocab = bpe.get_vocab()
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return sorted(vocab, key=lambda piece: (len(piece) == 1, vocab[piece])), merges


def tokenizer_json(pieces: list[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """``tokenizer.json`` in Llama 2's layout, whose last two pieces are ChatML's markers."""
    vocab = {piece: index for index, piece in enumerate(HEAD + BYTES + pieces + CHAT)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[token], "content": token, **flags} for token in HEAD + CHAT],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, *second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [" ".join(merge) for merge in merges],
        },
    }


def write_side_files(out: Path, texts: list[str]) -> None:
    """Train the tokenizer and write its files, config.json and generation_config.json."""
    marks = {"bos_token": CHAT[0], "eos_token": CHAT[1], "unk_token": "<unk>"}
    extra = {"additional_special_tokens": ["<s>", "</s>"]}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {0: HEAD[0], 1: HEAD[1], 2: HEAD[2], VOCAB - 2: CHAT[0], VOCAB - 1: CHAT[1]}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags} for index, token in added.items()},
        **extra,
        **marks,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": None,
        "tokenizer_class": "ArcticTokenizer",
    }
    generation = {"_from_model_config": True, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1}
    generation["transformers_version"] = CONFIG["transformers_version"]
    write_json(out / "tokenizer.json", tokenizer_json(*train_pieces(texts)))
    write_json(out / "tokenizer_config.json", settings)
    write_json(out / "special_tokens_map.json", {**extra, **marks})
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", generation)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
