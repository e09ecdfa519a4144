"""The table between the Hugging Face names and TensorRT-LLM's."""

from __future__ import annotations

from collections import Counter

import pytest

from arctic_trt.model.config import parse_config
from arctic_trt.model.names import (
    EMBEDDING,
    FINAL_NORM,
    LAYER,
    LM_HEAD,
    Cut,
    Kind,
    activation_scale,
    hf_expert,
    hf_layer,
    hf_shapes,
    site_of,
    weight_scale,
)
from tests.support.checkpoints import TINY, UNLIKE_TINY, Config, shapes_of


@pytest.mark.parametrize("raw", [TINY, UNLIKE_TINY], ids=["tiny", "unlike tiny"])
def test_the_expected_tensors_are_those_of_a_checkpoint(raw: Config) -> None:
    assert hf_shapes(parse_config(raw)) == shapes_of(raw)


def test_the_real_arctic_has_13828_tensors_and_957_gigabytes() -> None:
    raw = {**TINY, "hidden_size": 7168, "num_hidden_layers": 35, "num_attention_heads": 56, "intermediate_size": 4864}
    shapes = hf_shapes(parse_config({**raw, "num_local_experts": 128, "vocab_size": 32000}))
    assert len(shapes) == 13_828
    assert 2 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes.values()) == 957_169_217_536


def test_every_tensor_of_a_checkpoint_is_consumed_exactly_once() -> None:
    config = parse_config(TINY)
    consumed = Counter(name for row in (EMBEDDING, FINAL_NORM, LM_HEAD) for name in row.hf)
    for layer in range(config.num_hidden_layers):
        for row in LAYER:
            experts = range(config.num_local_experts if row.cut in (Cut.EXPERT_FC, Cut.EXPERT_PROJ) else 1)
            consumed.update(hf_layer(layer, name.format(e=expert)) for name in row.hf for expert in experts)
    assert consumed == Counter(hf_shapes(config).keys())


def test_no_tensor_of_tensorrt_llm_is_made_twice() -> None:
    assert max(Counter(row.trt for row in (*LAYER, EMBEDDING, FINAL_NORM, LM_HEAD)).values()) == 1


def test_the_two_conventions_of_gate_and_up() -> None:
    """The residual MLP's fc is the activated matrix; an expert's fc holds the linear matrix first."""
    made_of = {row.trt: row.hf for row in LAYER}
    assert made_of["residual_mlp.fc.weight"] == ("residual_mlp.w1.weight",)
    assert made_of["residual_mlp.gate.weight"] == ("residual_mlp.w3.weight",)
    assert [name.split(".")[-2] for name in made_of["mlp.fc.weight"]] == ["w3", "w1"]


def test_what_is_quantized() -> None:
    kinds = {row.trt: row.kind for row in LAYER}
    assert {name for name, kind in kinds.items() if kind is Kind.QUANTIZED} == {
        "attention.qkv.weight",
        "attention.dense.weight",
        "mlp.fc.weight",
        "mlp.proj.weight",
        "residual_mlp.fc.weight",
        "residual_mlp.gate.weight",
        "residual_mlp.proj.weight",
    }
    assert {name for name, kind in kinds.items() if kind is Kind.FLOAT32} == {"mlp.router.weight"}


def test_names_are_spelled_as_both_sides_spell_them() -> None:
    assert hf_expert(3, 17, "w2") == "model.layers.3.block_sparse_moe.experts.17.w2.weight"
    assert weight_scale("mlp.fc.weight") == "mlp.fc.weights_scaling_factor"
    assert activation_scale("mlp.fc.weight") == "mlp.fc.activation_scaling_factor"


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("model.layers.3.block_sparse_moe.experts.17.w1.weight", (3, "mlp.fc")),
        ("model.layers.3.block_sparse_moe.experts.0.w2.weight", (3, "mlp.proj")),
        ("model.layers.34.self_attn.v_proj.weight", (34, "attention.qkv")),
        ("model.layers.0.self_attn.o_proj.weight", (0, "attention.dense")),
        ("model.layers.0.residual_mlp.w3.weight", (0, "residual_mlp.gate")),
    ],
)
def test_the_site_of_a_tensor(name: str, site: tuple[int, str]) -> None:
    assert site_of(name) == site


def test_what_is_in_no_layer_has_no_site() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is no tensor of a layer"):
        site_of("lm_head.weight")


def test_every_tensor_of_a_layer_has_a_site() -> None:
    config = parse_config(TINY)
    sites = {site_of(name) for name in hf_shapes(config) if name.startswith("model.layers.")}
    assert sites == {(layer, row.trt.removesuffix(".weight")) for layer in range(2) for row in LAYER}
