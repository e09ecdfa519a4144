"""A small tokenizer of Arctic's kind: pieces that begin with a space mark, bytes for the rest, ChatML control tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors

MARK = "\N{LOWER ONE EIGHTH BLOCK}"
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [MARK, *"abcdefghijklmnopqrstuvwxyz.,!\n", "é", "世"]
PIECES = [f"{MARK}{letter}" for letter in "abcdeist"] + [f"{MARK}is", f"{MARK}the", "th", "he", "is"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(directory: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json; ids are below 400."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *BYTES, *LETTERS, *PIECES])}
    merges = [(MARK, letter) for letter in "abcdeist"] + [("t", "h"), ("h", "e"), ("i", "s"), (MARK, "is"), (f"{MARK}t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "ArcticTokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "additional_special_tokens": ["<s>", "</s>"],
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 300]}))
    return directory
