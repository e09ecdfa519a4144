"""The network: float32 logits against a forward pass written independently, and against the common mistakes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arctic_trt.checkpoint.hf import HfCheckpoint
from arctic_trt.model.layer import MlpWeights, decoder_layer, output_logits, rms_norm, route
from tests.support.checkpoints import TINY, UNLIKE_TINY, Config, Tensors, random_ids, random_tensors, write_checkpoint
from tests.support.modelopt_reference import hugging_face_model
from tests.support.naive_forward import naive_logits

SHORT = {**UNLIKE_TINY, "num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 3}
ONE_EXPERT_A_TOKEN = {**TINY, "num_key_value_heads": 16, "num_experts_per_tok": 1}
MODELS = {"tiny": TINY, "7 query heads per kv head, top-3": SHORT, "16 kv heads, top-1": ONE_EXPERT_A_TOKEN}


def in_float32(weights: Any) -> Any:
    if is_dataclass(weights):
        return type(weights)(*(in_float32(getattr(weights, field.name)) for field in fields(weights)))
    return weights.float()


def streamed_logits(source: HfCheckpoint, ids: list[int]) -> Tensor:
    """Float32 logits [T, V] with one expert's weights in memory at a time."""
    config = source.config
    x = source.read("model.embed_tokens.weight").float()[torch.tensor([ids])]
    for layer in range(config.num_hidden_layers):
        experts: Iterator[MlpWeights] = (in_float32(source.expert(layer, e)) for e in range(config.num_local_experts))
        x = decoder_layer(x, in_float32(source.dense(layer)), experts, config)
    return output_logits(x, source.read("model.norm.weight").float(), source.read("lm_head.weight").float(), config)[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest logit."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Tensors, list[int], Tensor]:
    """(config, tensors, token ids, the package's logits)."""
    config: Config = request.param
    tensors = random_tensors(config, seed=3)
    source = HfCheckpoint(write_checkpoint(tmp_path_factory.mktemp("layer"), config, tensors))
    [ids] = random_ids(config["vocab_size"], [12])
    return config, tensors, ids, streamed_logits(source, ids)


def test_streamed_logits_equal_an_independent_forward(model: tuple[Config, Tensors, list[int], Tensor]) -> None:
    config, tensors, ids, logits = model
    assert distance(logits, naive_logits(config, tensors, ids)) <= 1e-5


def test_streamed_logits_equal_the_hugging_face_network_in_float32(model: tuple[Config, Tensors, list[int], Tensor]) -> None:
    config, tensors, ids, logits = model
    with torch.inference_mode():
        expected = hugging_face_model(config, tensors).float()(torch.tensor([ids]))[0]
    assert distance(logits, expected) <= 1e-5


def test_the_moe_reads_the_input_of_the_layer(model: tuple[Config, Tensors, list[int], Tensor]) -> None:
    config, tensors, ids, logits = model
    assert distance(logits, naive_logits(config, tensors, ids, moe_after_attention=True)) > 1e-2


def test_w1_is_activated_and_w3_is_not(model: tuple[Config, Tensors, list[int], Tensor]) -> None:
    config, tensors, ids, logits = model
    assert distance(logits, naive_logits(config, tensors, ids, swap_gate_and_up=True)) > 1e-2


def test_logits_do_not_depend_on_later_tokens(tmp_path: Path) -> None:
    source = HfCheckpoint(write_checkpoint(tmp_path, TINY, random_tensors(TINY)))
    [ids] = random_ids(TINY["vocab_size"], [9])
    assert distance(streamed_logits(source, ids)[:4], streamed_logits(source, ids[:4])) <= 1e-5


def test_routing_shares_are_float32_and_sum_to_one() -> None:
    draw = torch.Generator().manual_seed(0)
    x, gate = torch.randn(50, 16, generator=draw).bfloat16(), torch.randn(6, 16, generator=draw).bfloat16()
    routing = route(x, gate, top_k=2)
    assert routing.share_TK.dtype == torch.float32
    assert torch.allclose(routing.share_TK.sum(-1), torch.ones(50))
    assert sum(len(routing.tokens_of(expert)[0]) for expert in range(6)) == 100
    alone = route(x, gate, top_k=1)
    assert alone.share_TK.max() < 1, "a single expert keeps its softmax share"


def test_the_norm_is_computed_in_float32_and_cast_before_the_weight() -> None:
    x, weight = torch.tensor([[300.0, 1.0]]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()
    exact = torch.tensor([300.0, 1.0]) / ((300.0**2 + 1) / 2 + 1e-5) ** 0.5
    assert rms_norm(x, weight, 1e-5)[0].equal(exact.bfloat16() * weight)
