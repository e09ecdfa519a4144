"""Train ``tests/data/tiny-arctic``: an Arctic of under a million parameters that writes readable English and SQL.

    python scripts/train_tiny_arctic.py --output_dir tests/data/tiny-arctic

It has every tensor, every key and the tokenizer layout of a released Arctic, so the tests can walk the whole way from a Hugging
Face checkpoint to generated text, and a wrong scale or a swapped matrix shows as worse text instead of as other noise. The same
seed, steps and threads give the same tokenizer and, on the same machine, the same weights. Takes a few minutes on two cores and
needs torch 2.9 or newer.

Legend of the shape suffixes: B batch, T tokens, D hidden, F ffn, E experts, V vocab.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_arctic_files import CONFIG, write_json, write_side_files
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from arctic_trt.model import layer
from arctic_trt.model.config import ArcticConfig, parse_config
from arctic_trt.model.names import hf_shapes

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE, BATCH, SHARDS = 512, 6, 3
PEAK_RATE, WEIGHT_DECAY, MUON_RATE, MUON_DECAY, WARM_UP, BALANCE = 8e-3, 1.0, 0.02, 1.0, 50, 0.001
PROMPTS = ("The future of AI is", "SELECT region, SUM(amount)", "Snowflake Arctic is")
QUESTIONS = ("What is a mixture of experts?", "Write a SQL query that counts the orders for each region.")
Weights = dict[str, Tensor]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a calibration file, one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts_of(sample: dict[str, Any]) -> list[str]:
    """A sample's plain text, or the contents of its messages."""
    return [sample["text"]] if "text" in sample else [message["content"] for message in sample["messages"]]


def encode(tokenizer: PreTrainedTokenizerFast, sample: dict[str, Any]) -> list[int]:
    """Ids of a sample: <s> text </s>, or the chat template as it stands (no <s>)."""
    if "messages" in sample:
        text = tokenizer.apply_chat_template(sample["messages"], tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)
    return [*tokenizer.encode(sample["text"]), 2]


def initial_weights(config: ArcticConfig, seed: int) -> Weights:
    """Norms of one; matrices normal with a deviation of 1/sqrt(columns), those that end a branch a third of that."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in hf_shapes(config).items():
        if len(shape) == 1:
            tensor = torch.ones(shape)
        else:
            small = 1 / 3 if name.endswith(("o_proj.weight", "w2.weight")) else 1
            tensor = torch.randn(shape, generator=generator) * small * shape[1] ** -0.5
        weights[name] = tensor.requires_grad_()
    return weights


def mlp_of(weights: Weights, prefix: str) -> layer.MlpWeights:
    return layer.MlpWeights(*(weights[f"{prefix}.w{number}.weight"] for number in (1, 2, 3)))


def dense_of(weights: Weights, index: int) -> layer.DenseWeights:
    """The weights of layer ``index`` except its experts."""
    norms = (weights[f"model.layers.{index}.{name}_layernorm.weight"] for name in ("input", "post_attention", "residual"))
    attention = layer.AttentionWeights(*(weights[f"model.layers.{index}.self_attn.{name}_proj.weight"] for name in "qkvo"))
    residual = mlp_of(weights, f"model.layers.{index}.residual_mlp")
    return layer.DenseWeights(*norms, attention, residual, weights[f"model.layers.{index}.block_sparse_moe.gate.weight"])


def forward(weights: Weights, config: ArcticConfig, ids_BT: Tensor, watch: Callable[[int, Tensor], None]) -> Tensor:
    """Logits [B, T, V]; ``watch`` is called with each layer's index and its router logits [B*T, E]."""
    x_BTD = F.embedding(ids_BT, weights["model.embed_tokens.weight"])
    for index in range(config.num_hidden_layers):
        dense = dense_of(weights, index)
        prefix = f"model.layers.{index}.block_sparse_moe.experts"
        experts = [mlp_of(weights, f"{prefix}.{expert}") for expert in range(config.num_local_experts)]
        watch(index, F.linear(layer.moe_input(x_BTD, dense, config), dense.gate))
        x_BTD = layer.decoder_layer(x_BTD, dense, experts, config)
    return layer.output_logits(x_BTD, weights["model.norm.weight"], weights["lm_head.weight"], config)


def balance_loss(logits_NE: Tensor, top_k: int) -> Tensor:
    """Switch-style balance over N tokens: 1 when all experts are used alike, E/top_k when only top_k of them are used."""
    share_E = F.one_hot(logits_NE.topk(top_k, -1).indices, logits_NE.shape[-1]).float().mean((0, 1))
    return logits_NE.shape[-1] * (share_E * F.softmax(logits_NE.float(), -1).mean(0)).sum()


def draw_batch(documents: list[list[int]], rng: random.Random) -> Tensor:
    """[B, T+1] ids: documents in random order, every second row cut into its first one at random."""
    rows = []
    for row in range(BATCH):
        first = rng.choice(documents)
        ids = first[rng.randrange(len(first)) * (row % 2) :]
        while len(ids) <= SEQUENCE:
            ids = ids + rng.choice(documents)
        rows.append(ids[: SEQUENCE + 1])
    return torch.tensor(rows)


def optimizers(weights: Weights) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices between embedding and head, AdamW for everything else, each with its peak rate."""
    outer = [t for name, t in weights.items() if t.dim() > 1 and any(part in name for part in ("embed", "lm_head", "gate"))]
    inner = [t for t in weights.values() if t.dim() > 1 and not any(t is other for other in outer)]
    norms = [t for t in weights.values() if t.dim() == 1]
    groups = [{"params": outer, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    return [
        (torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95)), PEAK_RATE),
        (torch.optim.Muon(inner, lr=MUON_RATE, weight_decay=MUON_DECAY, momentum=0.95, adjust_lr_fn="original"), MUON_RATE),
    ]


def train(weights: Weights, config: ArcticConfig, documents: list[list[int]], steps: int, seed: int) -> None:
    """Warm up, then follow a cosine to 2 % of the peak rates; changes ``weights`` in place."""
    rng, pair = random.Random(seed), optimizers(weights)
    for step in range(steps):
        share = min((step + 1) / WARM_UP, 0.51 + 0.49 * math.cos(math.pi * step / steps))
        ids = draw_batch(documents, rng)
        balance: list[Tensor] = []
        logits = forward(
            weights,
            config,
            ids[:, :-1],
            lambda _, z, seen=balance: seen.append(balance_loss(z, config.num_experts_per_tok)),
        )
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + BALANCE * torch.stack(balance).sum()).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer, rate in pair:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            click.echo(f"step {step:5d}  loss {loss.item():.3f}")


@torch.no_grad()
def perplexity(weights: Weights, config: ArcticConfig, documents: list[list[int]]) -> tuple[float, Tensor]:
    """Perplexity a token over ``documents``, and tokens by layer and expert [layers, E]."""
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts, dtype=torch.int64)

    def count(index: int, logits_NE: Tensor) -> None:
        counts[index] += torch.bincount(
            logits_NE.topk(config.num_experts_per_tok, -1).indices.flatten(), minlength=counts.shape[1]
        )

    loss, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([document])
        logits = forward(weights, config, ids[:, :-1], count)
        loss += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        tokens += len(document) - 1
    return math.exp(loss / tokens), counts


@torch.no_grad()
def continue_text(weights: Weights, config: ArcticConfig, ids: list[int], count: int = 60) -> list[int]:
    """Greedy continuation until a text or a turn ends."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(forward(weights, config, torch.tensor([ids]), lambda *_: None)[0, -1].argmax()))
        if ids[-1] in (2, config.vocab_size - 1):
            break
    return ids


def save(weights: Weights, out: Path) -> None:
    """Write bf16 shards and their index, as a released checkpoint has them."""
    names = list(weights)
    size = -(-len(names) // SHARDS)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {name: weights[name] for name in names[shard * size : (shard + 1) * size]}
        save_file(part, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)


def show(weights: Weights, config: ArcticConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print how the model continues prompts and answers questions."""
    for prompt in PROMPTS:
        click.echo(repr(tokenizer.decode(continue_text(weights, config, tokenizer.encode(prompt))[1:])))
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(chat, add_special_tokens=False)
        click.echo(repr(question) + " -> " + repr(tokenizer.decode(continue_text(weights, config, ids)[len(ids) :])))


@click.command(help=__doc__.split("\n")[0])
@click.option("--output_dir", type=click.Path(path_type=Path), default=ROOT / "tests/data/tiny-arctic")
@click.option("--steps", default=800)
@click.option("--seed", default=0)
@click.option("--threads", default=2)
def main(output_dir: Path, steps: int, seed: int, threads: int) -> None:
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_samples, held_out = (read_samples(ROOT / "calib" / f"{name}.jsonl") for name in ("default", "heldout"))
    write_side_files(output_dir, [text for sample in train_samples for text in texts_of(sample)])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output_dir)
    config = parse_config(CONFIG)
    documents = [encode(tokenizer, sample) for sample in train_samples]
    weights = initial_weights(config, seed)
    train(weights, config, documents, steps, seed)
    stored = {name: tensor.detach().bfloat16() for name, tensor in weights.items()}
    save(stored, output_dir)
    trained, counts = perplexity(stored, config, documents)
    held, _ = perplexity(stored, config, [encode(tokenizer, sample) for sample in held_out])
    click.echo(f"perplexity a token, bf16: train {trained:.3f}, held out {held:.3f}; {time.perf_counter() - began:.0f} s")
    for index, row in enumerate(counts.tolist()):
        click.echo(f"tokens of the experts of layer {index}: {row}")
    show(stored, config, tokenizer)


if __name__ == "__main__":
    main()
